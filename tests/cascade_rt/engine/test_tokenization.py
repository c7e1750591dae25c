"""Cutting and padding against the tokenizers library's own, and the memory of huge pairs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    BertWordPieceTokenizer,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from cascade_rt.engine import tokenization
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.errors import InferenceError, TextError
from cascade_rt.types import Text

from ...toy import WORDS, vocabulary

sides = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


def made(bundle: Path, folder: Path, padding: str, truncation: str) -> Path:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.enable_padding(direction=padding, pad_id=0, pad_type_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(32, direction=truncation)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("padding", "truncation"), [("right", "right"), ("left", "right"), ("right", "left")])
def test_tokens_are_those_of_the_library_that_cuts_and_pads_itself(
    bundle: Path, tmp_path: Path, pair: bool, padding: str, truncation: str
) -> None:
    file = made(bundle, tmp_path, padding, truncation)
    reference = Tokenizer.from_file(str(file))
    uncut = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    uncut.no_padding()
    ours = TextTokenizer(file, 32, pair)

    @settings(max_examples=60)
    @given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6))
    def compare(rows: list[tuple[str, str]]) -> None:
        given_texts = rows if pair else [row[0] for row in rows]
        wanted = reference.encode_batch(given_texts)
        encoded = ours.encode(given_texts)
        batch = encoded.batch(np.arange(len(rows)))
        assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        for name, field in (("input_ids", "ids"), ("attention_mask", "attention_mask"), ("token_type_ids", "type_ids")):
            np.testing.assert_array_equal(batch[name], [getattr(encoding, field) for encoding in wanted])
        whole = uncut.encode_batch(given_texts)
        assert [encoded.truncated(row) for row in range(len(rows))] == [len(encoding.ids) > 32 for encoding in whole]

    compare()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_any_rows_make_a_batch_also_from_elsewhere(bundle: Path, tmp_path: Path, padding: str) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.enable_padding(direction=padding, pad_id=7, pad_type_id=5, pad_token=".")
    tokenizer.post_processor = None  # so that a text may have no token
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path / "tokenizer.json", 8, pair=False)

    @given(st.lists(sides, min_size=1, max_size=6), st.data())
    def compare(texts: list[str], data: st.DataObject) -> None:
        encoded = ours.encode(texts)
        rows = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=6)))
        batch = encoded.batch(rows, ["input_ids", "token_type_ids"])
        for at, row in enumerate(rows):
            ids = tokenizer.encode(texts[row]).ids[:8]
            fill = batch["input_ids"].shape[1] - len(ids)
            front, back = (fill, 0) if padding == "left" else (0, fill)
            assert batch["input_ids"][at].tolist() == [7] * front + ids + [7] * back
            assert batch["token_type_ids"][at].tolist() == [5] * front + [0] * len(ids) + [5] * back
            if ids:
                assert batch["attention_mask"][at].tolist() == [0] * front + [1] * len(ids) + [0] * back
            else:
                assert batch["attention_mask"][at].nonzero()[0].tolist() == [fill - 1 if padding == "left" else 0]
        assert encoded.batch(rows, ["input_ids"]).keys() == {"input_ids", "attention_mask"}
        elsewhere = pickle.loads(pickle.dumps(encoded))
        gathered = Encoded.gathered([(encoded, row) for row in rows])
        for other, own in ((elsewhere, rows), (encoded.kept(rows), rows), (gathered, np.arange(len(rows)))):
            for name, values in other.batch(own).items():
                np.testing.assert_array_equal(values, batch[name])

    compare()


_PIECES = [*WORDS[:8], "naïve", "don't", "3.14", "...", " ", "  ", "\n", "\t ", "東京", "é", "☃", "[SEP]", "<mask>"]
long_texts = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), min_size=20, max_size=60).flatmap(
    lambda pieces: st.sampled_from([" ", "", "\n"]).map(lambda between: between.join(pieces))
)


def _library(kind: str) -> Tokenizer:
    """A tokenizer of each kind that splits at spaces, trained on the words."""
    if kind == "wordpiece":
        return BertWordPieceTokenizer({piece: at for at, piece in enumerate(vocabulary())})._tokenizer
    tokenizer, trainer = {
        "byte pairs": (Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=300, show_progress=False)),
        "unigram": (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(
                vocab_size=100, show_progress=False, unk_token="<unk>", special_tokens=["<unk>", "<mask>"]
            ),
        ),
    }[kind]
    if kind == "byte pairs":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.train_from_iterator([" ".join(WORDS[at : at + 9]) for at in range(0, len(WORDS), 3)], trainer)
    return tokenizer


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", ["wordpiece", "byte pairs", "unigram"])
def test_the_beginning_of_a_long_text_has_the_tokens_of_the_whole(
    kind: str, pair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _library(kind).save(str(tmp_path / "tokenizer.json"))
    # Without the special tokens, an even number remains: an odd one would go to the side that has more tokens.
    ours = TextTokenizer(tmp_path / "tokenizer.json", 7 if kind == "wordpiece" and pair else 6, pair)
    compared = 0

    @settings(max_examples=100)
    @given(long_texts, long_texts)
    def compare(first: str, second: str) -> None:
        nonlocal compared
        texts: list[Text] = [(first, second) if pair else first]
        with monkeypatch.context() as patched:
            patched.setattr(tokenization, "_LONGEST", 10**9)
            whole = ours.encode(texts)
            patched.setattr(tokenization, "_LONGEST", 48)
            patched.setattr(tokenization, "_LONGEST_WORD", 24)
            try:
                beginning = ours.encode(texts)
            except TextError:  # nothing was guessed
                return
        compared += max(len(first), len(second) * pair) > 48
        for name, values in whole.batch(np.arange(1)).items():
            np.testing.assert_array_equal(beginning.batch(np.arange(1))[name], values)
        assert beginning.truncated(0) == whole.truncated(0)

    compare()
    assert compared > 10


LONG = [
    ("a" * 2**12 + " b", True),
    ("good film " + "a" * 20_000 + " so sad, " + "0b" * 2**12 + ". the cat", True),  # shortened: of any length
    ("a" * 2**13 + "\u0301 b", True),
    ("good[UNK]" + "x" * 2**13 + "[MASK]b", True),
    (" " * 2**12 + "good film", False),
    (("a" + " " * 40) * 200, False),
    ("\u00e9" * 2**12 + " b", False),
    ("a.\u4e2d" * 2**11, False),
]


@pytest.mark.parametrize(("text", "at_any_length"), LONG)
def test_a_text_that_cannot_be_cut_at_a_space_has_the_tokens_of_the_whole(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, text: str, at_any_length: bool
) -> None:
    monkeypatch.setattr(tokenization, "_LONGEST", 2**12)
    monkeypatch.setattr(tokenization, "_LONGEST_WORD", 2**8)
    file = bundle / "tokenizer.json"
    library = Tokenizer.from_file(str(file))
    library.enable_truncation(300)
    library.no_padding()
    wanted = library.encode(text).ids
    ours = TextTokenizer(file, 300, pair=False, word_cache=False)  # which takes short ones of these
    encoded = ours.encode(["fine", text])
    assert encoded.batch(np.array([1]))["input_ids"][0].tolist() == wanted
    assert encoded.truncated(1) == (len(wanted) == 300)
    monkeypatch.setattr(tokenization, "_WHOLE", len(text) - 1)
    if at_any_length:
        assert ours.encode([text]).batch(np.arange(1))["input_ids"][0].tolist() == wanted
    else:
        with pytest.raises(TextError, match=r"text 0: found over [0-9,]+ characters, and .*; shorten the text"):
            ours.encode([text])


words = st.tuples(
    st.text("aB3", max_size=4), st.sampled_from([0, 0, 90, 99, 100, 101, 150, 400]), st.text("aé .[,\u0301", max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, max_size=8))
def test_words_that_are_too_long_for_wordpiece_may_be_shortened(
    bundle: Path, parts: list[tuple[str, int, str]]
) -> None:
    text = "".join(f"{before}{'x' * count}{after}" for before, count, after in parts)
    library = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ours = TextTokenizer(bundle / "tokenizer.json", 300, pair=False)
    shortened = ours._with_shorter_words(text)
    assert library.encode(shortened).ids == library.encode(text).ids


@pytest.mark.parametrize(
    ("change", "shortens"),
    [
        (lambda library: None, True),
        (lambda library: library.add_tokens(["xx"]), False),
        (lambda library: setattr(library, "normalizer", normalizers.Replace("x", " ")), False),
        (lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.Digits()), False),
        (lambda library: setattr(library, "model", models.BPE()), False),
    ],
)
def test_only_words_that_are_unknown_either_way_are_shortened(
    bundle: Path, tmp_path: Path, change: Any, shortens: bool
) -> None:
    library = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    change(library)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path / "tokenizer.json", 8, pair=False)
    assert (len(ours._with_shorter_words("x" * 1000)) < 1000) == shortens


@pytest.mark.parametrize(
    ("pre_tokenizer", "safe"),
    [
        (None, False),
        (pre_tokenizers.Metaspace(split=False), False),
        (pre_tokenizers.ByteLevel(use_regex=False), False),
        (pre_tokenizers.Split(" ", "removed"), False),
        (pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation()]), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), pre_tokenizers.Whitespace()]), False),
    ],
)
def test_only_tokenizers_that_split_at_spaces_take_a_beginning(
    pre_tokenizer: Any, safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json", 8, pair=False)
    if safe:
        assert len(tokenizer.encode(["a " * 2**20]).batch(np.arange(1))["input_ids"][0]) == 8
        return
    monkeypatch.setattr(tokenization, "_WHOLE", 2**20)
    with pytest.raises(TextError, match="this bundle's tokenizer needs all of it"):
        tokenizer.encode(["a " * 2**20])


def test_a_pair_of_megabytes_is_cut_in_bounded_memory(pair_bundle: Path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from cascade_rt import CascadeRuntime\n"
        "huge = 'the film was good ' * 60_000\n"
        f"answer, = CascadeRuntime({str(pair_bundle)!r}, threads=1).predict([(huge, huge)])\n"
        "print(answer.truncated)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr[-500:]


def test_a_text_that_cannot_be_used_is_named_by_its_position(bundle: Path) -> None:
    with pytest.raises(TextError, match="text 1: found int") as caught:
        TextTokenizer(bundle / "tokenizer.json", 32, pair=False).encode(["fine", 1])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_memory_that_runs_out_is_not_the_bundles_fault(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(bundle / "tokenizer.json", 32, pair=False, word_cache=False)

    def exhausted(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tokenizer, "_encode", exhausted)
    with pytest.raises(InferenceError, match="memory ran out.*fewer or shorter texts"):
        tokenizer.encode(["a film"])
