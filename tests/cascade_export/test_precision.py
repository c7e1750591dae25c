"""Precisions: what each keeps of the fp32 answers, which of them is touched by batch-mates, and the gate before it."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from cascade_export import cli
from cascade_export import member as module
from cascade_export.check import Check, Speed, check_drop, compare
from cascade_export.export import export_bundle
from cascade_export.member import TABLE
from cascade_export.precision import WRITERS, write_precision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from cascade_rt import BundleError, CascadeRuntime, read_bundle
from cascade_rt.bundle import BATCH_TOLERANCE
from cascade_rt.bundle.precisions import PRECISIONS
from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError

from ..conftest import LABELS, WORDS, make_member

X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member wide enough for int8 to have something to average over, with texts that it answers and their labels."""
    folder = make_member(tmp_path_factory.mktemp("wide") / "wide", layers=2, hidden=64, seed=5, spread=0.25)
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(1, 20))) for _ in range(120)]
    made = export_bundle([str(folder)], folder.parent / "fp32", max_length=32)
    assert made.members[0].precision == "fp32"
    answers = CascadeRuntime(folder.parent / "fp32").predict(texts)
    rows = [{"text": text, "label": answer.label} for text, answer in zip(texts, answers, strict=True)]
    (folder.parent / "check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def bundles(wide: Path) -> dict[str, Path]:
    """The same member in every precision."""
    for precision in WRITERS:
        export_bundle(
            [str(wide)],
            wide.parent / precision,
            max_length=32,
            precision=precision,
            check=Check(wide.parent / "check.jsonl", max_accuracy_drop=20),
            overwrite=True,
        )
    return {precision: wide.parent / precision for precision in WRITERS}


def test_every_precision_that_the_runtime_knows_can_be_written() -> None:
    assert [*WRITERS, TABLE] == list(PRECISIONS), "the last is that of averaging networks"


def test_every_precision_answers_nearly_as_fp32_does(bundles: dict[str, Path]) -> None:
    texts = [json.loads(line)["text"] for line in (bundles["fp32"].parent / "check.jsonl").read_text().splitlines()]
    exact = CascadeRuntime(bundles["fp32"]).member_logits(texts)[0][0]
    for precision, folder in bundles.items():
        (member,) = read_bundle(folder).members
        assert member.precision == precision
        found = CascadeRuntime(folder).member_logits(texts)[0][0]
        allowed = {"fp32": 1e-6, "fp16": 0.02}.get(precision, 0.3)
        error = np.abs(found - exact).mean() / exact.std()
        assert error < allowed, f"{precision}: {error}"
        if precision != "fp32":
            assert error > 0, "it is another precision"
            smaller = 1 if precision == "fp32-int8-words" else 0.75  # it has few words
            assert member.size(folder / member.file) < smaller * member.size(bundles["fp32"] / member.file)


def test_only_dynamic_ranges_of_whole_batches_depend_on_batch_mates(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for precision, folder in bundles.items():
        (member,) = read_bundle(folder).members
        invariant = member.other["batch_difference"] <= BATCH_TOLERANCE
        assert invariant == PRECISIONS[precision].batch_invariant
        assert main(["info", "--model-dir", str(folder)]) == 0
        assert ("depends on the other texts of its batch" in capsys.readouterr().out) != invariant


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=20), min_size=2, max_size=40), st.randoms())
def test_int8_scores_do_not_change_with_the_company(bundles: dict[str, Path], drawn: list[list[str]], order) -> None:  # type: ignore[no-untyped-def]
    runtime = CascadeRuntime(bundles["int8"])
    texts = [" ".join(words) for words in drawn]
    alone = [runtime.predict([text])[0] for text in texts]
    order.shuffle(rows := list(range(len(texts))))
    together = runtime.predict([texts[row] for row in rows])
    for row, answer in zip(rows, together, strict=True):
        assert answer.score == pytest.approx(alone[row].score, abs=1e-4)
        assert (answer.label, answer.exit) == (alone[row].label, alone[row].exit)
        if X86:
            assert answer == alone[row], "bit for bit"


def test_texts_make_int8_more_faithful(bundles: dict[str, Path], tmp_path: Path) -> None:
    plain = shutil.copytree(bundles["int8"], tmp_path / "plain")
    write_precision(bundles["fp32"] / "wide.onnx", plain / "wide.onnx", "int8")
    draw = np.random.default_rng(8)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(1, 20))) for _ in range(200)]
    exact, nearest, better = (
        CascadeRuntime(folder, verify=False).member_logits(texts)[0][0]
        for folder in (bundles["fp32"], plain, bundles["int8"])
    )
    assert np.abs(better - exact).mean() < 0.8 * np.abs(nearest - exact).mean()


def test_int8_keeps_no_big_weight_in_fp32(bundles: dict[str, Path]) -> None:
    model = onnx.load(bundles["int8"] / "wide.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulIntegerToFloat") == 2 * 6, "query, key, value, output and two of the feed-forward"
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    assert all(weights[node.input[1]].dtype == np.int8 for node in products)
    assert max(weight.size for weight in weights.values() if weight.dtype == np.float32) <= 64 * 64  # pooler, positions


def test_int8_without_zero_points_is_refused_where_it_would_end_the_process(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = shutil.copytree(bundles["int8-vnni"], tmp_path / "older")
    model = onnx.load(older / "wide.onnx")
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            del node.input[5:]
    onnx.save(model, older / "wide.onnx")
    expected = CascadeRuntime(bundles["int8-vnni"]).predict(["a film"])
    assert CascadeRuntime(older, verify=False).predict(["a film"]) == expected

    monkeypatch.setattr("cascade_rt.engine.providers.int8_saturates", lambda: True)
    monkeypatch.setattr("onnxruntime.__version__", "1.29.1")
    reason = r"CPU without VNNI and onnxruntime 1\.29\.1, which cannot .* export the member again in int8 or fp32, or"
    for name, folder in {"older": older, "int8-static": bundles["int8-static"]}.items():
        with pytest.raises(BundleError, match=reason):
            CascadeRuntime(folder, verify=False).predict([name])
    assert CascadeRuntime(bundles["int8-vnni"]).predict(["a film"])[0].label == expected[0].label
    assert CascadeRuntime(bundles["fp32"]).predict(["a film"])


def test_the_check_reports_and_refuses_with_its_numbers(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = wide.parent / "check.jsonl"
    rows = [json.loads(line) for line in check.read_text().splitlines()]
    unlabelled = wide.parent / "unlabelled.jsonl"
    unlabelled.write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows))
    mixed = wide.parent / "mixed.jsonl"
    mixed.write_text('{"text": "a film", "label": "good"}\n{"text": "a cat"}\n')
    assert main(["export", "--member", str(wide), "--output", "out", "--check-data", str(mixed)]) == 2
    assert "found labels for 1 of 2 texts, expected all or none" in capsys.readouterr().err
    arguments = ["export", "--member", str(wide), "--output", "out", "--max-length", "32", "--precision", "int8-tensor"]
    for file, found in ((check, "accuracy 100.00 -> "), (unlabelled, "no labels known")):
        assert main([*arguments, "--check-data", str(file), "--max-accuracy-drop", "0"]) == 2
        error = capsys.readouterr().err
        assert "member 'wide' in int8-tensor may lose" in error
        assert found in error
        assert error.count("\n") == 1
        assert not Path("out").exists()
    assert main([*arguments, "--check-data", str(check), "--max-accuracy-drop", "30", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["members"][0]["check"]
    assert report["texts"] == len(rows)
    assert report["accuracy"]["original"] == 1
    assert report["accuracy"]["exported"] == pytest.approx(report["labels_agree"])
    assert 0 < report["mean_probability_difference"] < report["max_probability_difference"] <= 1
    assert {"dis", "ece"} <= report.keys()


def test_auto_takes_the_fastest_that_passes(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        module, "speeds", lambda members, _: {name: Speed(1.0, 1.0 + order.index(name)) for name in members}
    )
    check = wide.parent / "check.jsonl"
    last = [module.FP32_ON_OPENVINO]
    for order[:], drop, expected in (
        (["int8", "fp16", "fp32", *last], 100, "int8"),
        (["fp16", "int8", "fp32", *last], 100, "fp16"),
        (["int8", "fp32", "fp16", *last], 0, "fp32"),
    ):
        made = export_bundle(
            [str(wide)],
            tmp_path / "auto",
            max_length=32,
            precision="auto",
            check=Check(check, max_accuracy_drop=drop),
            overwrite=True,
        )
        (member,) = made.members
        assert member.precision == expected, member.other["auto"]
        timed = {"int8", "fp16", "fp32", *(last if find_spec("openvino") else [])}
        assert member.other["auto"]["seconds_per_text"].keys() == timed
        assert ("int8" in member.other["auto"]["refused"]) == (drop == 0)
    if find_spec("openvino"):
        order[:] = [*last, "int8", "fp16", "fp32"]
        made = export_bundle(
            [str(wide)], tmp_path / "elsewhere", precision="auto", check=Check(check, max_accuracy_drop=100)
        )
        assert made.members[0].precision == "int8"
        assert cli._faster_elsewhere(made.members[0]) == (
            "wide: fp32 was faster with OpenVINO, 1.00 times for single texts and 2.00 times in bulk; to check it: "
            "--provider openvino --precision fp32"
        )
    with pytest.raises(InputError, match="no texts to compare on; give check data"):
        export_bundle([str(wide)], tmp_path / "none", precision="auto")


def test_exporting_says_nothing_but_its_result(wide: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "from cascade_rt.cli import main\n"
        f"member = {str(wide)!r}\n"
        "for precision in ('int8', 'int8-blocks'):\n"
        "    assert main(['export', '--member', member, '--output', precision, '--precision', precision]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "INFO" not in done.stderr
    assert "WARNING" not in done.stderr


def test_each_member_can_have_its_own(member_folders: list[Path], tmp_path: Path) -> None:
    made = export_bundle(
        [str(folder) for folder in member_folders], tmp_path / "mixed", precision={"": "int8", "tiny": "fp32"}
    )
    assert [member.precision for member in made.members] == ["fp32", "int8", "int8"]
    for precision, says in (
        ("int7", "found the precision 'int7', expected one of: fp32, fp16, fp32-int8-words, fp16-int8-words, int8, "),
        ({"huge": "int8"}, r"`precision`: found \['huge'\], expected members among: tiny"),
    ):
        with pytest.raises(CascadeError, match=says):
            export_bundle([str(member_folders[0])], tmp_path / "no", precision=precision)
    assert main(["export", "--member", "x", "--output", "o", "--precision", "int8", "--precision", "fp32"]) == 2


def test_one_of_few_texts_is_let_pass_unless_nothing_may_be_lost() -> None:
    def report(texts: int, lost: int) -> dict[str, object]:
        exported = np.tile([0.9, 0.1], (texts, 1))
        exported[:lost] = [0.1, 0.9]
        return compare(np.tile([0.9, 0.1], (texts, 1)), exported, np.zeros(texts, dtype=np.intp))

    check_drop("m", "int8", report(100, 1), 0.5)
    check_drop("m", "int8", report(1000, 5), 0.5)
    for texts, lost, allowed in ((100, 2, 0.5), (1000, 6, 0.5), (100, 1, 0.0)):
        with pytest.raises(CascadeError, match="may lose"):
            check_drop("m", "int8", report(texts, lost), allowed)


def test_comparing_agrees_with_plain_counting() -> None:
    original = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    exported = np.array([[0.8, 0.2], [0.6, 0.4], [0.2, 0.8], [0.6, 0.4]])
    report = compare(original, exported, np.array([0, 1, 0, 0]))
    assert report["labels_agree"] == 3 / 4
    assert report["max_probability_difference"] == pytest.approx(0.2)
    assert report["mean_probability_difference"] == pytest.approx(0.1)
    assert report["accuracy"] == {"original": 3 / 4, "exported": 2 / 4}
    assert "accuracy" not in compare(original, exported, None)
    assert len(LABELS) == 3
