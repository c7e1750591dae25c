"""`cascade-rt benchmark` on a tiny bundle. What it measures is not asserted: machines differ."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cascade_rt.benchmark import latency
from cascade_rt.cli import main

ARGUMENTS = [
    "--texts=24",
    "--rounds=2",
    "--batch-size",
    "1",
    "8",
    "--speedup",
    "1.5",
    "2",
    "9",
    "--words=5:2",
    "--threads=1",
]


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_cold_start", partial(latency._cold_start, runs=1))


def test_the_report_is_printed_and_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "new" / "report.json"
    arguments = ["--model-dir", str(bundle), *ARGUMENTS, "--json", "--output", str(output)]
    assert main(["benchmark", *arguments]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    report: dict[str, Any] = json.loads(line)
    assert json.loads(output.read_text("utf-8")) == report
    assert "pip install 'cascade-rt[plot]'" in captured.err, "why there is no picture"
    assert [path.name for path in output.parent.iterdir()] == ["report.json"]
    assert report["batches"].keys() == {"1", "8", "bulk"}
    assert report["taus"].keys() == {"1.5", "2.0"}, "9x is out of reach"
    assert (report["texts"]["count"], report["rounds"], report["threads"]) == (24, 2, 1)
    for rows in report["batches"].values():
        assert rows.keys() == {"big", "1.5", "2.0"}
        for aimed in ("1.5", "2.0"):
            assert rows[aimed]["layer_speedup"] >= float(aimed)
            exits = rows[aimed]["exits"]
            assert sum(exits) == 24
            assert rows[aimed]["layer_speedup"] == pytest.approx(4 * 24 / (exits[0] + 3 * exits[1] + 7 * exits[2]))
            wall, realised = rows[aimed]["wall_speedup"], rows[aimed]["realised"]
            assert 0 < wall["min"] <= wall["median"] <= wall["max"]
            assert realised["median"] == pytest.approx(wall["median"] / rows[aimed]["layer_speedup"])
    assert report["overhead"]["1"]["median"] > 1
    assert report["first_member"].keys() == {"1", "bulk"}
    for parts in report["first_member"].values():
        assert 1 < parts["over_tokenization"]["min"] <= parts["over_tokenization"]["median"]
        assert 0 < parts["tokenization_ms"]["min"] < parts["tokenization_ms"]["max"]
        assert parts["beyond_tokenization_ms"]["min"] > 0
    assert report["cold_start"]["all members run"]["seconds"]["median"] > 0


def test_the_table_and_the_picture(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "report.json"
    assert main(["benchmark", "--model-dir", str(bundle), *ARGUMENTS, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert all(
        word in captured.out
        for word in ("batch", "layers", "FLOPs", "wall", "realised", "p95 ms", "beyond it", "cold start")
    )
    assert f"written: {output}, {output.with_suffix('.png')}" in captured.err
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_texts_can_come_from_a_file(
    pair_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_cold_start", lambda *_: {})
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\n" + "a film\ta cat\nso sad\tso happy\n" * 6)
    arguments = ["--data", "pairs.tsv", "--texts", "12", "--rounds", "1", "--batch-size", "4", "--json"]
    assert main(["benchmark", "--model-dir", str(pair_bundle), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"]["from"] == "pairs.tsv"
    assert report["texts"]["tokens"]["p50"] == 7, "two words each, and three special tokens"
    (tmp_path / "empty.tsv").write_text("sentence1\tsentence2\n")
    assert main(["benchmark", "--model-dir", str(pair_bundle), "--data", "empty.tsv"]) == 2
    assert "empty.tsv: found no texts, expected at least one" in capsys.readouterr().err
