"""ONNX folders as Optimum and transformers.js lay them out become members, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_export.onnx_checkpoint import is_onnx

from cascade_rt import BundleError, CascadeRuntime, read_bundle
from cascade_rt.cli import main
from cascade_rt.errors import CascadeError

from .families import FAMILIES, POSITIONS

_TEXTS = ["a great film", "so sad", "the cat sat on the mat " * 9, ""]


@pytest.fixture(scope="module")
def laid_out(member_folders: list[Path], bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members without torch weights: one with external data as Optimum writes it, one as for transformers.js."""
    from onnxruntime.quantization import quantize_dynamic

    root = tmp_path_factory.mktemp("onnx")
    for name in ("small", "big"):
        shutil.copytree(
            next(folder for folder in member_folders if folder.name == name),
            root / name,
            ignore=shutil.ignore_patterns("*.safetensors"),
        )
    model = onnx.load(bundle / "small.onnx")
    onnx.save(
        model, root / "small" / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=64
    )
    (root / "big" / "onnx").mkdir()
    onnx.save(onnx.load(bundle / "big.onnx"), root / "big" / "onnx" / "model.onnx")
    quantize_dynamic(
        bundle / "big.onnx",
        root / "big" / "onnx" / "model_quantized.onnx",
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return root


def test_they_answer_as_the_same_members_from_torch(laid_out: Path, bundle: Path, tmp_path: Path) -> None:
    made = export_bundle([str(laid_out / "small"), str(laid_out / "big")], tmp_path / "made", max_length=32)
    (small, big) = made.members
    assert (small.file, [data.file for data in small.data]) == ("small/model.onnx", ["small/model.onnx_data"])
    assert (big.file, big.data, big.precision, big.layers, big.hidden_size) == ("big.onnx", (), "fp32", 4, 32)
    theirs = CascadeRuntime(bundle, members=["small", "big"]).member_logits(_TEXTS)[0]
    np.testing.assert_allclose(CascadeRuntime(tmp_path / "made").member_logits(_TEXTS)[0], theirs, atol=1e-5)
    assert read_bundle(bundle).members[1].parameters == pytest.approx(small.parameters, rel=0.05)


def test_no_torch_is_needed(laid_out: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum', 'onnx'): sys.modules[name] = None\n"
        "from cascade_rt.cli import main\n"
        f"status = main(['export', '--member', {str(laid_out / 'small')!r}, '--output', 'bundle'])\n"
        "sys.exit(status or main(['predict', '--model-dir', 'bundle', 'a film']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"exit": 0' in done.stdout


def test_the_file_of_a_precision_is_taken_and_compared_with_fp32(laid_out: Path, tmp_path: Path) -> None:
    texts = tmp_path / "check.txt"
    texts.write_text("\n".join(_TEXTS[:3]))
    made = export_bundle(
        [str(laid_out / "big")], tmp_path / "made", precision="int8-tensor", check=Check(texts, max_accuracy_drop=100)
    )
    (member,) = made.members
    assert member.precision == "int8-tensor"
    assert 0 < member.other["check"]["max_probability_difference"] < 1
    named = export_bundle([str(laid_out / "big" / "onnx" / "model_quantized.onnx")], tmp_path / "named")
    assert (named.members[0].sha256, named.members[0].name) == (member.sha256, "big")
    with pytest.raises(CascadeError, match="found the precision 'fp16', expected one of: fp32, int8-tensor"):
        export_bundle([str(laid_out / "big")], tmp_path / "none", precision="fp16")


def test_without_an_original_nothing_is_said_to_agree(
    laid_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(laid_out / "big", tmp_path / "big")
    shutil.copy(folder / "onnx" / "model_quantized.onnx", tmp_path / "kept.onnx")
    shutil.rmtree(folder / "onnx")
    shutil.move(tmp_path / "kept.onnx", folder / "model.onnx")
    rows = [{"text": text, "label": "good"} for text in _TEXTS]
    (tmp_path / "check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["export", "--member", str(folder), "--output", "out", "--check-data", "check.jsonl"]) == 0
    _, facts, _, _, header, row, *_ = capsys.readouterr().out.splitlines()
    assert "int8-tensor" in facts, "by its operators, whatever its name"
    assert "accuracy" in header
    assert "labels equal" not in header, "there is no original to compare with"
    assert "->" not in row
    assert "labels_agree" not in read_bundle("out").members[0].other["check"]
    assert main(["info", "--model-dir", "out"]) == 0
    assert "depends on the other texts of its batch" in capsys.readouterr().out


def test_a_graph_that_does_not_fit_its_config_is_refused(laid_out: Path, tmp_path: Path) -> None:
    for change, says in (
        ({"id2label": {"0": "a", "1": "b"}}, r"logits of shape \(\d+, 3\), expected \(\d+, 2\)"),
        ({"max_position_embeddings": None}, "small: cannot be opened"),
        ({"max_position_embeddings": -1}, "expected positive numbers"),
        ({"num_hidden_layers": -1}, "expected positive numbers"),
        ({"max_position_embeddings": 10**6}, "cannot run"),
    ):
        folder = shutil.copytree(laid_out / "small", tmp_path / "small", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CascadeError, match=says):
            export_bundle([str(folder)], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (folder / "config.json").write_text(json.dumps(config))


def test_field_numbers_that_others_read_differently_are_refused(laid_out: Path, tmp_path: Path) -> None:
    """A graph under field 7 + 2^29 would be skipped here and loaded by readers that drop the high bits."""
    from cascade_rt.bundle.onnx_file import scan

    content = bytearray((laid_out / "small" / "model.onnx").read_bytes())
    model = onnx.load(laid_out / "small" / "model.onnx", load_external_data=False)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    length, size = b"", len(graph)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    hidden = model.SerializeToString() + b"\xba\x80\x80\x80\x10" + length + bytes([size]) + graph
    (tmp_path / "hidden.onnx").write_bytes(hidden)
    (tmp_path / "open.onnx").write_bytes(content)
    assert scan(tmp_path / "open.onnx").external == {"model.onnx_data"}
    with pytest.raises(BundleError, match="not an ONNX model .field number"):
        scan(tmp_path / "hidden.onnx")


def test_external_data_is_verified_and_confined(laid_out: Path, tmp_path: Path) -> None:
    export_bundle([str(laid_out / "small")], tmp_path / "made")
    data = tmp_path / "made" / "small" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="model.onnx_data: truncated or altered"):
        read_bundle(tmp_path / "made")
    read_bundle(tmp_path / "made", verify=False)
    data.unlink()
    for verify in (True, False):
        with pytest.raises(BundleError, match="model.onnx_data: is missing"):
            read_bundle(tmp_path / "made", verify=verify)


def test_external_data_that_the_manifest_does_not_list_is_refused(laid_out: Path, tmp_path: Path) -> None:
    export_bundle([str(laid_out / "small")], tmp_path / "made")
    path = tmp_path / "made" / "cascade.json"
    manifest = json.loads(path.read_text())
    del manifest["members"][0]["data"], manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="keeps weights in 'model.onnx_data', which cascade.json does not list"):
        read_bundle(tmp_path / "made")


@pytest.mark.parametrize("location", ["../outside", "/etc/passwd"])
def test_weights_outside_the_folder_are_refused(laid_out: Path, tmp_path: Path, location: str) -> None:
    folder = shutil.copytree(laid_out / "small", tmp_path / "small")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    shutil.copy(laid_out / "small" / "model.onnx_data", tmp_path / "outside")
    with pytest.raises(CascadeError, match="model.onnx"):
        export_bundle([str(folder)], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_positions_are_asked_of_the_graph(tmp_path: Path) -> None:
    torch_folder = FAMILIES["roberta"](tmp_path / "roberta")
    export_bundle([str(torch_folder)], tmp_path / "from-torch")
    (torch_folder / "model.safetensors").unlink()
    onnx.save(onnx.load(tmp_path / "from-torch" / "roberta.onnx"), torch_folder / "model.onnx")
    assert export_bundle([str(torch_folder)], tmp_path / "from-onnx").max_length == POSITIONS
    assert CascadeRuntime(tmp_path / "from-onnx").predict(_TEXTS) == CascadeRuntime(tmp_path / "from-torch").predict(
        _TEXTS
    )


def test_what_is_missing_is_named(
    laid_out: Path, member_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_onnx(str(member_folders[0]))
    for name, spoil, says in (
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "expected config.json and tokenizer.json beside"),
        ("config.json", "{}", "has no config.json"),
        ("config.json", '{"model_type": "bert"}', "has no num_hidden_layers"),
        ("model.onnx", "no model", "not an ONNX model|cannot load it"),
        ("model.onnx_data", None, "keeps weights there|cannot load it"),
    ):
        folder = shutil.copytree(laid_out / "small", tmp_path / "spoiled")
        (folder / name).unlink() if spoil is None else (folder / name).write_text(spoil)
        assert main(["export", "--member", str(folder), "--output", "out"]) == 2
        error = capsys.readouterr().err
        assert any(said in error for said in says.split("|")), error
        assert error.count("\n") == 1
        shutil.rmtree(folder)
    assert not Path("out").exists()


def test_one_file_is_written_beside_the_bundle(
    laid_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [option for name in ("small", "big") for option in ("--member", str(laid_out / name))]
    command = ["export", *members, "--output", "out", "--single-file", "one.onnx"]
    (tmp_path / "one.onnx").write_bytes(b"mine")
    assert main(command) == 2
    assert "one.onnx: exists already" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([*command, "--overwrite"]) == 0
    assert "one.onnx: small (2L fp32), big (4L fp32); 3 labels" in capsys.readouterr().out
    names = [tensor.name for tensor in onnx.load("one.onnx").graph.output]
    assert names == ["probabilities", "exit", "layers"]
