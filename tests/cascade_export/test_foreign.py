"""Checkpoints of others: whatever is odd about a folder is answered as the original answers, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cascade_export.torch_checkpoint import open_torch

from cascade_rt.errors import InputError

REMOVED = object()


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Change keys of a folder's JSON file; REMOVED takes one out."""
    path = folder / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    found |= changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not REMOVED}))
    return folder


@pytest.fixture
def folder(member_folders: list[Path], tmp_path: Path) -> Path:
    """A copy of a classifier, to damage."""
    return shutil.copytree(member_folders[0], tmp_path / "member")


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def a_folder(file: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return spoil


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, **changes)


def tokenizer_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, "tokenizer_config.json", **changes)


def without(*files: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return spoil


TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
HALF = {"rope_type": "default", "rope_theta": 50.0}

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "several labels": (config(problem_type="multi_label_classification"), "problem_type .*one label per text"),
    "regression": (config(problem_type="regression"), "problem_type .*one label per text"),
    "another function": (config(function_to_apply="sigmoid"), "function_to_apply .*expected softmax"),
    "settings of a task": (
        config(task_specific_params={"text-classification": {"function_to_apply": "none"}}),
        "task_specific_params .*move them",
    ),
    "a token classifier": (
        config(architectures=["BertForTokenClassification"]),
        "BertForTokenClassification.*fine-tune",
    ),
    "a language model": (config(architectures=["BertForMaskedLM"]), "BertForMaskedLM, expected one that ends in"),
    "one label": (config(id2label={"0": "score"}), "found the labels score; .*regression"),
    "ids from 1": (config(id2label={"1": "a", "2": "b", "3": "c"}), r"ids \[1, 2, 3\]; expected 0 to 2"),
    "ids with a gap": (config(id2label={"0": "a", "1": "b", "3": "c"}), r"ids \[0, 1, 3\]; expected 0 to 2"),
    "ids that are words": (config(id2label={"a": 0, "b": 1}), "id2label .*the name of each label by its id"),
    "a list of labels": (config(id2label=["a", "b", "c"]), "id2label .*the name of each label by its id"),
    "a label that is null": (config(id2label={"0": "a", "1": "b", "2": None}), "found id2label null; .*as text"),
    "fewer labels than logits": (
        config(id2label={"0": "a", "1": "b"}),
        "cannot be opened .*size mismatch",
    ),
    "code of the repository": (config(auto_map={"AutoConfig": "mine.Mine"}), "auto_map for AutoConfig.*never runs"),
    "a model in the repository": (
        config(auto_map={"AutoModelForSequenceClassification": "mine.Mine"}),
        "auto_map for AutoModelForSequenceClassification.*never runs",
    ),
    "a tokenizer in the repository": (
        tokenizer_config(auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        "auto_map for AutoTokenizer.*never runs",
    ),
    "a tokenizer as written once": (tokenizer_config(auto_map=["mine.Mine", None]), "auto_map for AutoTokenizer"),
    "quantised weights": (config(quantization_config={"quant_method": "gptq"}), "quantization_config .*dequantize"),
    "an adapter": (write("adapter_config.json", b"{}"), "adapter.*merge_and_unload"),
    "settings of transformers 5": (config(rope_parameters=HALF), "rope_parameters .*reads for a bert"),
    "a tokenizer of transformers 5": (tokenizer_config(tokenizer_class="TokenizersBackend"), "TokenizersBackend"),
    "special tokens of transformers 5": (
        tokenizer_config(extra_special_tokens=["[A]"]),
        "extra_special_tokens .*additional_special_tokens",
    ),
    "special tokens that are split": (tokenizer_config(split_special_tokens=True), "split_special_tokens .*false"),
    "an unknown tokenizer": (tokenizer_config(tokenizer_class="MineTokenizer"), "cannot be opened .*MineTokenizer"),
    "an unknown architecture": (config(model_type="mine"), "cannot be opened .*mine"),
    "no architecture": (config(model_type=REMOVED), "cannot be opened .*model_type"),
    "no config.json": (without("config.json"), "has no config.json"),
    "a config.json that is not JSON": (write("config.json", b"{"), "cannot read config.json .*expected a JSON object"),
    "a config.json that is a list": (write("config.json", b"[]"), "cannot read config.json .found a list.*JSON object"),
    "a config.json that is a folder": (a_folder("config.json"), "cannot read config.json .*Is a directory"),
    "a tokenizer_config.json that is not JSON": (write("tokenizer_config.json", b"{"), "cannot read tokenizer_config"),
    "no weights": (without("model.safetensors"), "cannot be opened .*model.safetensors"),
    "weights of no bytes": (write("model.safetensors", b""), "cannot be opened .*header"),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999]),
        "cannot be opened .*",
    ),
    "weights of another shape": (config(vocab_size=7), "cannot be opened .*size mismatch"),
    "weights of another width": (config(hidden_size=64), "cannot be opened .*size mismatch"),
    "more layers than weights": (config(num_hidden_layers=3), "has no weights for bert.encoder.layer.1"),
    "a broken setting": (config(num_attention_heads=7), "cannot be opened .*multiple of the number of attention"),
    "a broken function": (config(hidden_act="mine"), "cannot be opened .*mine"),
    "no tokenizer": (without(*TOKENIZER), "has no tokenizer; .*tokenizer.json"),
    "a broken tokenizer": (write("tokenizer.json", b"{}"), "cannot be opened"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_answers_or_cannot_be_opened_is_refused_in_one_line(folder: Path, name: str) -> None:
    spoil, says = REFUSED[name]
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        open_torch(str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    assert len(message) < 500
