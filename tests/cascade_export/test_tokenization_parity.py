"""The runtime's tokens against those of transformers: cut and padded on either side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cascade_rt.engine.tokenization import TextTokenizer

from ..toy import WORDS, write_tokenizer

sides = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


def made(folder: Path, padding: str, truncation: str) -> Path:
    file = folder / "tokenizer.json"
    write_tokenizer(file)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(direction=padding, pad_id=0, pad_type_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(32, direction=truncation)
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("padding", "truncation"), [("right", "right"), ("left", "right"), ("right", "left")])
def test_tokens_are_transformers_tokens(tmp_path: Path, pair: bool, padding: str, truncation: str) -> None:
    file = made(tmp_path, padding, truncation)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(shutil.copy(file, tmp_path / "reference.json")),
        pad_token="[PAD]",
        padding_side=padding,
        truncation_side=truncation,
    )
    ours = TextTokenizer(file, 32, pair)

    @settings(max_examples=60)
    @given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6))
    def compare(rows: list[tuple[str, str]]) -> None:
        first, second = [row[0] for row in rows], [row[1] for row in rows] if pair else None
        wanted = reference(first, second, padding=True, truncation=True, max_length=32, return_tensors="np")
        encoded = ours.encode(rows if pair else first)
        batch = encoded.batch(np.arange(len(rows)))
        assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        for name, array in batch.items():
            np.testing.assert_array_equal(array, wanted[name])
        whole = reference(first, second)["input_ids"]
        assert [encoded.truncated(row) for row in range(len(rows))] == [len(ids) > 32 for ids in whole]

    compare()
