"""A member without encoder layers is exported with the FLOPs of its own graph, and members are ordered by cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cascade_export.export import export_bundle
from cascade_export.flops import graph_flops

from cascade_rt import CascadeRuntime, read_bundle

from ..toy import LABELS, encoder_weights, write_cascade, write_model


@pytest.fixture
def bag(tmp_path: Path, member_folders: list[Path]) -> Path:
    """A bag of words as an ONNX folder, with the tokenizer of the other members."""
    folder = tmp_path / "bag"
    shutil.copytree(member_folders[1], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_model(folder / "model.onnx", encoder_weights(layers=1, hidden=16, seed=4), layers=range(0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0, "hidden_size": 16}))
    return folder


def test_products_are_counted_in_the_graph(bag: Path, tmp_path: Path) -> None:
    assert graph_flops(bag / "model.onnx") == (2 * 16 * 16 + 2 * 16 * len(LABELS), 0, 0), "pooler and classifier"
    folder = write_cascade(tmp_path / "bundle")
    entry = read_bundle(folder).members[1]
    constant, linear, square = graph_flops(folder / entry.file)
    head = 2 * 32 * 32 + 2 * 32 * len(LABELS)
    assert (constant, linear + square) == (head, entry.cost(1)), "the rest is what the encoder's shape says"


def test_it_is_the_first_member(bag: Path, member_folders: list[Path], tmp_path: Path) -> None:
    made = export_bundle([str(member_folders[1]), str(bag)], tmp_path / "made", max_length=32)
    assert [(entry.layers, entry.flops) for entry in made.members] == [(0, (608, 0, 0)), (2, ())]
    assert made.format_version == 3
    with CascadeRuntime(tmp_path / "made", thresholds=0.0) as runtime:
        assert {answer.layers for answer in runtime.predict(["a film", "so sad"])} == {0}
