"""Cutting and padding against the tokenizers library's own, and the memory of huge pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InferenceError, TextError

from ...toy import WORDS

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

    @settings(max_examples=60, deadline=None)
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
    with pytest.raises(TextError, match="text 1: found a int") as caught:
        TextTokenizer(bundle / "tokenizer.json", 32, pair=False).encode(["fine", 1])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_memory_that_runs_out_is_not_the_bundles_fault(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(bundle / "tokenizer.json", 32, pair=False)

    def exhausted(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tokenizer, "_encode", exhausted)
    with pytest.raises(InferenceError, match="memory ran out.*fewer or shorter texts"):
        tokenizer.encode(["a film"])
