"""Export: the bundle answers as torch does, members that do not fit are refused, failures leave nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cascade_export import torch_files
from cascade_export.convert import convert
from cascade_export.export import export_bundle
from cascade_export.torch_checkpoint import open_torch
from cascade_export.verify import check_texts
from transformers import BertModel

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError

from ..conftest import LABELS, make_member


def test_members_are_sorted_fused_and_described(bundle: Path) -> None:
    members = read_bundle(bundle).members
    assert [(member.name, member.layers, member.hidden_size) for member in members] == [
        ("tiny", 1, 16),
        ("small", 2, 32),
        ("big", 4, 32),
    ]
    for member in members:
        assert member.other["fused"]["Attention"] == member.layers
        assert member.other["max_probability_difference"] <= 1e-4
        assert member.intermediate_size == 3 * member.hidden_size
        assert member.precision == "fp32"
        assert member.positions == 64


def test_order_on_the_command_line_does_not_matter(
    member_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [argument for folder in reversed(member_folders) for argument in ("--member", str(folder))]
    assert main(["export", *members, "--output", "made/bundle", "--threshold", "0.75", "--max-length", "16"]) == 0
    assert "made/bundle: 3 members, 3 labels" in capsys.readouterr().out
    bundle = read_bundle(tmp_path / "made" / "bundle")
    assert [member.name for member in bundle.members] == ["tiny", "small", "big"]
    assert bundle.thresholds == [0.75, 0.75]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["bundle"]
    assert main(["export", *members, "--output", "made/bundle"]) == 2
    assert "overwrite that bundle" in capsys.readouterr().err


def test_the_check_covers_empty_short_padded_and_cut_texts(member_folders: list[Path]) -> None:
    checkpoint = open_torch(str(member_folders[0]))
    lengths = [len(ids) for ids in checkpoint.tokenizer(check_texts(checkpoint))["input_ids"]]
    assert min(lengths) == 2
    assert max(lengths) > 512
    assert len(set(lengths)) >= 8


def test_a_graph_that_differs_from_torch_is_refused_and_nothing_is_written(
    member_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(checkpoint: Any, path: Path, exporter: str) -> dict[str, int]:
        fused = convert(checkpoint, path, exporter)
        model = onnx.load(path)
        bias = next(weight for weight in model.graph.initializer if weight.name.endswith("classifier.bias"))
        values = onnx.numpy_helper.to_array(bias) + np.array([0.01, 0, 0], dtype=np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)
        return fused

    monkeypatch.setattr(torch_files, "convert", spoiled)
    with pytest.raises(CascadeError, match=r"member 'tiny': the exported graph differs from torch.*check text \d+"):
        export_bundle([str(member_folders[0])], tmp_path / "out" / "bundle", max_length=32)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_export_keeps_the_bundle_that_was_there(
    member_folders: list[Path], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_files, "verify", interrupted)
    before = read_bundle(copied)
    with pytest.raises(KeyboardInterrupt):
        export_bundle([str(member_folders[0])], copied, overwrite=True)
    assert read_bundle(copied) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_members_that_do_not_fit_are_refused_with_what_differs(member_folders: list[Path], tmp_path: Path) -> None:
    def refused(other: Path, says: str) -> None:
        with pytest.raises(CascadeError, match=says):
            export_bundle([str(member_folders[1]), str(other)], tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    refused(
        make_member(tmp_path / "labels", layers=4, labels=("no", "so-so", "yes")),
        "labels bad, fine, good against no, so-so, yes",
    )
    refused(make_member(tmp_path / "words", layers=1, words=("zebra",)), "small: lacks 1 of the .*words .'zebra'")
    same_name = shutil.copytree(member_folders[2], tmp_path / "elsewhere" / "small")
    refused(same_name, "two members are called 'small'")
    for name, record, says in (
        ("pairs", {"pair": True}, "single texts against pairs"),
        ("short", {"max_length": 16}, "maximum length 64 against 16 tokens"),
    ):
        folder = shutil.copytree(member_folders[2], tmp_path / name)
        (folder / "cascade_train.json").write_text(json.dumps(record))
        refused(folder, says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--member nowhere --output out", "nowhere: no such folder"),
        ("--member MEMBER --output out --max-length 65", "--max-length: found 65, expected 3 to 64 tokens"),
        ("--member MEMBER --output out --max-length 2", "--max-length: found 2, expected 3 to 64 tokens"),
        ("--member MEMBER --output out --threshold 2", "--threshold: found 2, expected a number from 0 to 1"),
        ("--random 2x100 --output out", "--random: found '2x100', expected LAYERSxHIDDEN"),
        ("--random 2 --output out", "--random: found '2'"),
        ("--random 2x64 --member MEMBER --output out", "not allowed with argument"),
        ("--output out", "one of the arguments --member --random is required"),
        ("--member MEMBER --output .", "exists and is not a bundle"),
    ],
)
def test_the_command_refuses_in_one_line(
    member_folders: list[Path], arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments.replace("MEMBER", str(member_folders[0])).split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_what_training_recorded_reaches_the_bundle(member_folders: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(member_folders[0], tmp_path / "trained")
    (folder / "cascade_train.json").write_text(json.dumps({"pair": True, "max_length": 24, "task": "toy"}))
    rows = [{"text": "a film", "text_pair": "a cat", "label": "good"}] * 3
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert check_texts(open_torch(str(folder)))[-3:] == [("a film", "a cat")] * 3
    bundle = export_bundle([str(folder)], tmp_path / "bundle")
    assert (bundle.pair, bundle.max_length, bundle.labels) == (True, 24, LABELS)
    assert bundle.provenance["checkpoints"]["trained"]["training"] == {"task": "toy"}
    assert {"torch", "transformers", "onnx", "onnxruntime"} <= bundle.provenance["versions"].keys()
    assert CascadeRuntime(tmp_path / "bundle").predict([("a film", "a cat")])[0].exit == 0


def test_what_cannot_be_a_member_is_refused(member_folders: list[Path], tmp_path: Path) -> None:
    def refused(folder: Path, says: str) -> None:
        with pytest.raises(InputError, match=says):
            export_bundle([str(folder)], tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    refused(make_member(tmp_path / "one", layers=1, labels=("only",)), "a model of one score")
    refused(make_member(tmp_path / "twins", layers=1, labels=("a", "a")), "expected at least two, with different names")
    for name, file, content in (
        ("weights", "model.safetensors", b"\x00" * 64),
        ("tokens", "tokenizer.json", b"{}"),
        ("record", "cascade_train.json", b"{"),
    ):
        folder = shutil.copytree(member_folders[0], tmp_path / name)
        (folder / file).write_bytes(content)
        refused(folder, f"{name}: cannot be (opened|used) ")
    headless = tmp_path / "headless"
    shutil.copytree(member_folders[0], headless)
    BertModel.from_pretrained(member_folders[0]).save_pretrained(headless)
    refused(headless, "not a fine-tuned classifier .*found the architecture BertModel")
    config = json.loads((headless / "config.json").read_text())
    del config["architectures"]
    (headless / "config.json").write_text(json.dumps(config))
    refused(headless, "not a fine-tuned classifier .*classifier.bias")


def test_three_members_with_two_names_are_refused(member_folders: list[Path], tmp_path: Path) -> None:
    twin = shutil.copytree(member_folders[2], tmp_path / "elsewhere" / "big")
    with pytest.raises(CascadeError, match="two members are called 'big'"):
        export_bundle([str(member_folders[0]), str(member_folders[2]), str(twin)], tmp_path / "bundle")


def test_random_members_have_the_asked_shapes_and_spread_confidences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--random", "1x64", "--random", "3x96", "--output", "bundle", "--max-length", "64"]) == 0
    assert capsys.readouterr().err == "", "no progress of other libraries"
    runtime = CascadeRuntime("bundle")
    assert [(member.layers, member.hidden_size) for member in runtime.bundle.members] == [(1, 64), (3, 96)]
    texts = [" ".join(["bakedi", "fogu", "lamo", "rita"][: 1 + index % 4]) + str(index) for index in range(60)]
    scores = [answer.score for answer in CascadeRuntime("bundle", thresholds=0.0).predict(texts)]
    assert len(set(scores)) > 50, "thresholds can split them"
