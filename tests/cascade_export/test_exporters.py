"""Optimum, where it is installed, makes the same graphs as the exporter that needs nothing but torch."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from cascade_export.check import Check, reference
from cascade_export.checkpoint import EXPORTERS, OPTIMUM, TRACE, built_in_texts
from cascade_export.convert import convert
from cascade_export.export import export_bundle
from cascade_export.torch_checkpoint import open_torch
from cascade_train.compat import MAJOR
from numpy.typing import NDArray

from cascade_rt import read_bundle
from cascade_rt.cli import main
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InvalidOption, MissingExtraError

from .families import FAMILIES

HAS_OPTIMUM = MAJOR < 5 and find_spec("optimum") is not None
optimum = pytest.mark.skipif(not HAS_OPTIMUM, reason="needs the extra optimum, and transformers 4")


@optimum
@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "electra", "albert", "roberta", "mpnet", "modernbert", "deberta-v2"]
)
def test_both_exporters_lead_to_one_fused_graph(family: str, tmp_path: Path) -> None:
    checkpoint = open_torch(str(FAMILIES[family](tmp_path / "member")))
    checkpoint.write_tokenizer(tmp_path / "tokenizer.json")
    encoded = TextTokenizer(tmp_path / "tokenizer.json", checkpoint.max_length, pair=False).encode(
        built_in_texts(False)
    )
    batch = encoded.batch(np.arange(len(encoded.lengths)))
    fused: dict[str, dict[str, int]] = {}
    logits: dict[str, NDArray[np.float32]] = {}
    operators: dict[str, Counter[str]] = {}
    for exporter in EXPORTERS:
        path = tmp_path / f"{exporter}.onnx"
        fused[exporter] = convert(checkpoint, path, exporter)
        operators[exporter] = Counter(node.op_type for node in onnx.load(path).graph.node)
        logits[exporter] = reference(checkpoint, path).run(batch).logits
    assert fused[TRACE] == fused[OPTIMUM]
    if family == "roberta":  # Optimum's has token types as a constant of its own
        assert operators[TRACE].total() < operators[OPTIMUM].total()
        np.testing.assert_allclose(logits[TRACE], logits[OPTIMUM], atol=1e-4)
    else:
        assert operators[TRACE] == operators[OPTIMUM]
        np.testing.assert_array_equal(logits[TRACE], logits[OPTIMUM])


def test_the_manifest_names_the_exporter(member_folders: list[Path], tmp_path: Path) -> None:
    bundle = export_bundle([str(folder) for folder in member_folders[:2]], tmp_path / "bundle", max_length=16)
    checkpoints = bundle.provenance["checkpoints"]
    assert [checkpoints[name]["exporter"] for name in ("tiny", "small")] == [
        {"name": "trace", "package": "torch", "version": version("torch")}
    ] * 2
    assert read_bundle(tmp_path / "bundle").provenance == bundle.provenance


@optimum
def test_the_command_exports_by_optimum(member_folders: list[Path], tmp_path: Path) -> None:
    assert main(["export", "--member", str(member_folders[0]), "--output", "out", "--exporter", "optimum"]) == 0
    manifest = json.loads((tmp_path / "out" / "cascade.json").read_text("utf-8"))
    assert manifest["provenance"]["checkpoints"]["tiny"]["exporter"] == {
        "name": "optimum",
        "package": "optimum-onnx",
        "version": version("optimum-onnx"),
    }


def test_without_optimum_its_extra_is_named(
    member_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if MAJOR < 5:
        monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    found = "it needs transformers 4, found 5" if MAJOR > 4 else "optimum"
    with pytest.raises(MissingExtraError, match=rf"exporter optimum needs .*{found}.*'cascade-rt\[optimum\]'"):
        export_bundle([str(member_folders[0])], tmp_path / "out", check=Check(exporter=OPTIMUM))
    assert main(["export", "--member", str(member_folders[0]), "--output", "out", "--exporter", "optimum"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_exporter_is_refused() -> None:
    with pytest.raises(InvalidOption, match="one of: trace, optimum"):
        Check(exporter="dynamo")
