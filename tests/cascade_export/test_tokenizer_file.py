"""A bundle's tokenizer.json against transformers' own reading of a folder, for each setting that changes tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cascade_export.tokenizer_file import bundled, check_same_tokens, longest, read_tokenizer
from cascade_train.settings import read_settings
from cascade_train.sources import load_tokenizer
from tokenizers import Tokenizer

from cascade_rt.errors import InputError

from ..toy import vocabulary, write_tokenizer
from .families import _byte_pairs

BERT = {"tokenizer_class": "BertTokenizer"}
ROBERTA = {"tokenizer_class": "RobertaTokenizer"}
ADDED = {"content": "[ORDER]", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}


def a_folder(folder: Path, settings: dict[str, Any], file: dict[str, Any], prefix: bool | None, added: bool) -> Path:
    folder.mkdir()
    if prefix is None:
        write_tokenizer(folder / "tokenizer.json", ["Good", "café", "中文"])
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        backend = _byte_pairs()
    if added:
        backend.add_tokens(["[ORDER]"])
    written = json.loads(backend.to_str())
    written["normalizer"] = written["normalizer"] and written["normalizer"] | file
    if prefix is not None:
        written["pre_tokenizer"]["add_prefix_space"] = prefix
        written["added_tokens"][4]["lstrip"] = True  # of <mask>, as in published files
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


@pytest.mark.parametrize(
    ("settings", "file", "prefix", "added"),
    [
        (BERT, {"lowercase": False}, None, False),
        (BERT | {"do_lower_case": False}, {}, None, False),
        (BERT | {"do_lower_case": False}, {"lowercase": False}, None, False),
        (BERT | {"strip_accents": False}, {}, None, False),
        (BERT | {"strip_accents": True, "do_lower_case": False}, {}, None, False),
        (BERT | {"tokenize_chinese_chars": False}, {}, None, False),
        (BERT, {"handle_chinese_chars": False}, None, False),
        ({"do_lower_case": False}, {}, None, False),
        ({"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False}, {}, None, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, {}, None, False),
        (BERT | {"truncation_side": "left"}, {}, None, False),
        (BERT | {"padding_side": "left", "clean_up_tokenization_spaces": False}, {}, None, True),
        (BERT | {"model_input_names": ["input_ids", "attention_mask"]}, {}, None, False),
        (BERT | {"additional_special_tokens": ["[ORDER]"]}, {}, None, True),
        (ROBERTA | {"add_prefix_space": True}, {}, False, False),
        (ROBERTA | {"add_prefix_space": False}, {}, True, False),
        (ROBERTA, {}, True, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, {}, False, True),
    ],
)
@pytest.mark.parametrize("pair", [False, True])
def test_settings_are_followed_from_the_files_alone(
    tmp_path: Path, settings: dict[str, Any], file: dict[str, Any], prefix: bool | None, added: bool, pair: bool
) -> None:
    folder = a_folder(tmp_path / "folder", settings, file, prefix, added)
    found = read_tokenizer(read_settings("x", folder), pad_id=0)
    backend = bundled(found.backend, found.padding, 24, found.cut, typed=found.typed)
    check_same_tokens("x", backend, load_tokenizer(str(folder)), 24, pair)


@pytest.mark.parametrize(
    "settings",
    [
        BERT | {"added_tokens_decoder": {"5": ADDED | {"special": False}}},
        BERT | {"additional_special_tokens": ["[OTHER]"]},
        BERT | {"mask_token": "[HIDDEN]"},
    ],
)
def test_added_tokens_that_the_two_files_know_otherwise_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = a_folder(tmp_path / "folder", settings, {}, None, added=True)
    with pytest.raises(InputError, match="added tokens that tokenizer.json has not.*save_pretrained"):
        read_tokenizer(read_settings("x", folder), pad_id=0)


def test_a_difference_is_named_with_its_text(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder", BERT | {"do_lower_case": False}, {}, None, added=False)
    theirs = load_tokenizer(str(folder))
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours.enable_truncation(24)
    with pytest.raises(
        InputError, match=r"gives other tokens than transformers for .The QUICK.*expected '\[CLS\] \[UNK\]"
    ):
        check_same_tokens("x", ours, theirs, 24, pair=False)


def test_tokens_that_are_drawn_at_random_are_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder", ROBERTA, {}, False, added=False)
    written = json.loads((folder / "tokenizer.json").read_text())
    written["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="tokenizer.json: found dropout 0.1; expected null"):
        load_tokenizer(str(folder))


def test_padding_and_length_come_from_either_file(tmp_path: Path) -> None:
    ids = vocabulary()
    folder = a_folder(tmp_path / "folder", BERT | {"pad_token": {"content": "[MASK]"}, "max_len": 50}, {}, None, False)
    settings = read_settings("x", folder)
    assert read_tokenizer(settings, pad_id=0).padding.id == ids["[MASK]"]
    assert longest(settings) == 50
    bare = read_settings("x", a_folder(tmp_path / "bare", {"model_max_length": 1e30}, {}, None, False))
    assert read_tokenizer(bare, pad_id=7).padding.token == "[PAD]"
    assert longest(bare) == 10**9
