"""Variants of training texts."""

from __future__ import annotations

from cascade_train.unlabelled import variants
from hypothesis import given
from hypothesis import strategies as st

Text = str | tuple[str, str]
WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "five", "six"]), min_size=1, max_size=9)
SINGLE = WORDS.map(" ".join)
TEXTS = st.lists(SINGLE, min_size=1, max_size=12, unique=True) | st.lists(
    st.tuples(SINGLE, SINGLE), min_size=1, max_size=12, unique=True
)


def sides(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


@given(texts=TEXTS, each=st.integers(0, 4), seed=st.integers(0, 9))
def test_variants_are_new_texts_of_the_same_words(texts: list[Text], each: int, seed: int) -> None:
    found = variants(texts, each, seed)
    assert found == variants(texts, each, seed)
    assert len(set(found)) == len(found) <= each * len(texts)
    assert not set(found) & set(texts)
    known = {word for text in texts for word in "\t".join(sides(text)).split()}
    for text in found:
        assert isinstance(text, type(texts[0]))
        assert set("\t".join(sides(text)).split()) <= known
        if len(pair := sides(text)) == 2:
            assert any(pair[0] == sides(other)[0] or pair[1] == sides(other)[1] for other in texts), "one is as it was"


def test_half_of_the_variants_only_lack_words() -> None:
    texts = [" ".join(f"w{number}-{place}" for place in range(12)) for number in range(400)]
    found = [str(text) for text in variants(texts, 2, 0)]
    lacking = [text for text in found if len({word.split("-")[0] for word in text.split()}) == 1]
    assert 0.4 < len(lacking) / len(found) < 0.6
    kept = sum(len(text.split()) for text in lacking) / len(lacking)
    assert 0.75 * 12 < kept < 0.85 * 12
