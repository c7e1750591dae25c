"""Tokens put together from words, against the library's: equal ids, types and truncation of hostile texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from cascade_rt import CascadeRuntime
from cascade_rt.engine import word_cache
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.engine.word_cache import WordCache
from cascade_rt.types import Text

from ...toy import WORDS, write_tokenizer
from .test_tokenization import _library

LONGEST = 24
_SPECIALS = ["[CLS]", "[SEP]", "[MASK]", "[UNK]", "[mask]", "[sep", "##s", "<unk>", "<mask>", "two words"]
_PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(_SPECIALS),
    st.text(st.characters(max_codepoint=127), max_size=6),
    st.text(st.sampled_from("aA1.,'\"-_$^`~@#[]{}<>"), max_size=12),
    st.text(max_size=4),
    st.sampled_from(["é", "ß", "İ", "\u0301", "東京", "한국", "☃", "\u200b", "\ufffd", "x" * 120, "\x7f", "\x1c", "ﬁ"]),
)
_plain = st.lists(st.sampled_from([*WORDS, "don't", "3.5%", "(so)"]), min_size=1, max_size=14).map(" ".join)
texts = _plain | st.lists(_PIECES, max_size=14).flatmap(
    lambda pieces: st.sampled_from([" ", " ", " ", "", "  ", "\n", "\t", "\u00a0"]).map(lambda gap: gap.join(pieces))
)


def _bert(folder: Path) -> Tokenizer:
    write_tokenizer(folder / "bert.json")
    return Tokenizer.from_file(str(folder / "bert.json"))


def _bert_of_other_tokens(folder: Path) -> Tokenizer:
    """Case matters, added tokens take case, spaces around them and only whole words."""
    tokenizer = _bert(folder)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    tokenizer.add_tokens([AddedToken("film", lstrip=True), AddedToken("GOOD", single_word=True, normalized=False)])
    return tokenizer


def _roberta(_: Path) -> Tokenizer:
    tokenizer = _library("byte pairs")
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True)])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ids, add_prefix_space=False)
    return tokenizer


def _byte_pairs_with_a_space_before(_: Path) -> Tokenizer:
    tokenizer = _library("byte pairs")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _byte_pairs_with_runs_of_spaces(_: Path) -> Tokenizer:
    tokenizer = _library("byte pairs")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=False) for count in (2, 3, 4)])
    return tokenizer


def _unigram(_: Path) -> Tokenizer:
    return _library("unigram")


def _unigram_of_words(_: Path) -> Tokenizer:
    tokenizer = _library("unigram")
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


KINDS = (
    _bert,
    _bert_of_other_tokens,
    _roberta,
    _byte_pairs_with_a_space_before,
    _byte_pairs_with_runs_of_spaces,
    _unigram,
    _unigram_of_words,
)


def rows(encoded: Encoded) -> list[tuple[list[int], list[int], bool]]:
    """Return ids, types and the truncation flag of each text."""
    found = []
    for text in range(len(encoded)):
        batch = encoded.batch(np.array([text]))
        ids, types, mask = (batch[name][0] for name in ("input_ids", "token_type_ids", "attention_mask"))
        found.append((ids[mask == 1].tolist(), types[mask == 1].tolist(), encoded.truncated(text)))
    return found


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_equal(kind: Callable[[Path], Tokenizer], pair: bool, truncation: str, tmp_path: Path) -> None:
    tokenizer = kind(tmp_path)
    tokenizer.enable_truncation(LONGEST, direction=truncation)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    quick, slow = (TextTokenizer(tmp_path / "tokenizer.json", LONGEST, pair, word_cache=on) for on in (True, False))
    taken = 0

    @settings(max_examples=60)
    @given(st.lists(st.tuples(texts, texts) if pair else texts, min_size=1, max_size=5))
    def compare(some: list[Text]) -> None:
        nonlocal taken
        found = quick.encode(some)
        assert rows(found) == rows(slow.encode(some))
        assert [rows(quick.encode([text])) for text in some] == [rows(slow.encode([text])) for text in some]
        taken += found.from_words

    compare()
    assert taken > 10
    plain = [("the cat was happy", "a dull one")] if pair else ["the cat was happy"]
    assert (quick.encode(plain).from_words, slow.encode(plain).from_words) == (1, 0)


def test_long_texts_in_windows_are_left_to_the_library(bundle: Path) -> None:
    quick, slow = (TextTokenizer(bundle / "tokenizer.json", 8, False, word_cache=on) for on in (True, False))
    some = ["good film", "the film was not very good but the cat was happy", "dull"]
    found, wanted = (one.encode(some, stride=2) for one in (quick, slow))
    assert found.from_words == 2
    np.testing.assert_array_equal(found.counts, wanted.counts)
    np.testing.assert_array_equal(found.batch(np.arange(5))["input_ids"], wanted.batch(np.arange(5))["input_ids"])


def test_memory_is_bounded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_BYTES", 20_000)
    quick, slow = (TextTokenizer(bundle / "tokenizer.json", 64, False, word_cache=on) for on in (True, False))
    words = quick._words
    assert words is not None
    for start in range(0, 3000, 30):
        some = [f"film{start + at} is good{at}" for at in range(30)]
        assert rows(quick.encode(some)) == rows(slow.encode(some))
        assert words._bytes == sum(word_cache._size(*entry) for entry in words._known.items()) <= 20_000


def test_threads_share_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_BYTES", 20_000)
    quick, slow = (TextTokenizer(bundle / "tokenizer.json", 64, False, word_cache=on) for on in (True, False))
    calls = [[f"film{start % 90} is good{at}" for at in range(20)] for start in range(300)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(quick.encode, calls))
    assert [rows(each) for each in found[:90]] == [rows(slow.encode(call)) for call in calls[:90]]


METASPACE = {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"normalizer": {"type": "Prepend", "prepend": "x"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": " "}},
        METASPACE | {"normalizer": {"type": "Replace", "pattern": {"String": "-"}, "content": " "}},
        METASPACE | {"normalizer": {"type": "Replace", "pattern": {"String": "*"}, "content": ""}},
    ],
)
def test_other_tokenizers_have_none(change: dict[str, object], tmp_path: Path) -> None:
    described = json.loads(_bert(tmp_path).to_str()) | change
    assert WordCache.of(Tokenizer.from_str(json.dumps(described)), lambda *_: []) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert TextTokenizer(tmp_path / "tokenizer.json", 16, False).encode(["a film"]).from_words == 0


@pytest.mark.parametrize("content", ["two words", " film", "film ", "a\nfilm", "  "])
def test_an_added_token_with_spaces_turns_it_off(content: str, tmp_path: Path) -> None:
    tokenizer = _bert(tmp_path)
    tokenizer.add_tokens([content])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(tmp_path / "tokenizer.json", 16, False).encode(["a film"]).from_words == 0


def test_a_vocabulary_without_an_unknown_token_is_no_obstacle(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert rows(TextTokenizer(tmp_path / "tokenizer.json", 16, False).encode(["one two"])) == [([0, 1], [0, 0], False)]


def test_many_words_at_once_are_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_BYTES", 2000)
    quick, slow = (TextTokenizer(bundle / "tokenizer.json", 64, False, word_cache=on) for on in (True, False))
    some = [" ".join(f"{text}film{at}" for at in range(20)) for text in range(30)]
    assert rows(quick.encode(some)) == rows(slow.encode(some))
    assert quick._words is not None
    assert quick._words._bytes <= 2000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_opening_a_bundle_and_single_texts_start_no_threads(bundle: Path) -> None:
    """A forked process would not have them: see `Forks.own_tokenizers_threads`."""
    code = (
        "import sys; from cascade_rt import CascadeRuntime; from cascade_rt.engine.forks import FORKS\n"
        "CascadeRuntime(sys.argv[1]).predict(['several words that it has never seen, 1 2 3']); print(FORKS._tokenizing)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "None\n"


def test_the_runtime_counts_texts_from_words(bundle: Path) -> None:
    some = ["a good film", "[MASK] film", "so sad"]
    with CascadeRuntime(bundle) as quick, CascadeRuntime(bundle, word_cache=False) as slow:
        assert quick.predict(some) == slow.predict(some)
        assert quick.predict(some[0:1]) == slow.predict(some[0:1])
        assert (quick.stats().from_words, slow.stats().from_words) == (3, 0)
        assert (quick.stats(reset=True).from_words, quick.stats().from_words) == (3, 0)
