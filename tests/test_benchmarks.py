"""The benchmark commands run end to end on tiny bundles. What they measure is not asserted: machines differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import LABELS, WORDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments), "--output", "report.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(Path("report.json").read_text("utf-8"))
    assert report["machine"]["usable_cpus"] >= 1
    return report


def test_latency_reports_every_batch_and_speedup(bundle: Path) -> None:
    arguments = ["--model-dir", bundle, "--texts", 40, "--rounds", 2, "--batch-size", 1, 8, "--words", "5:2"]
    report = run("latency.py", *arguments)
    assert report["batches"].keys() == {"1", "8", "bulk"}
    for rows in report["batches"].values():
        assert rows.keys() == {"big", "1.5", "2", "3"}, "4x and 5x are out of reach of 1 + 2 + 4 layers"
        for aimed in ("1.5", "2", "3"):
            assert rows[aimed]["layer_speedup"] >= float(aimed)
            assert sum(rows[aimed]["exits"]) == 40
            realised = rows[aimed]["realised"]
            assert 0 < realised["min"] <= realised["median"] <= realised["max"]
            assert rows[aimed]["wall_speedup"]["median"] == pytest.approx(
                realised["median"] * rows[aimed]["layer_speedup"], rel=1e-6
            )
    assert report["overhead"]["1"]["median"] > 1
    assert report["cold_start"]["first member answers"]["seconds"]["median"] > 0
    assert Path("report.png").stat().st_size > 5000


def test_memory_watches_the_plateau(bundle: Path) -> None:
    report = run("memory.py", "--model-dir", bundle, "--count", 3000, "--settle", 1000, "--every", 500)
    assert [row["texts"] for row in report["resident"]] == [500, 1000, 1500, 2000, 2500, 3000]
    assert sum(report["exits"]) == 3000


def test_peers_meet_in_one_run(member_folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    rows = [f"{WORDS[index]} {WORDS[-index]},{LABELS[index % 3]}" for index in range(20)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    members = [argument for folder in member_folders[1:] for argument in ("--member", folder)]
    report = run(
        "peers.py", *members, "--data", "data.csv", "--texts", 20, "--rounds", 1, "--max-length", 32, "--speedup", 1.5
    )
    contestants = report["contestants"]
    assert {name.split(",")[0].split(" ")[0] for name in contestants} == {
        "transformers",
        "Optimum",
        "OpenVINO",
        "cascade-rt",
    }
    exact = [name for name in contestants if "fp32" in name or name == "cascade-rt, big alone"]
    assert len(exact) == 4
    assert len({contestants[name]["accuracy"] for name in exact}) == 1, "all run the same biggest model"
    assert report["cold_start"]["times_faster"]["median"] > 0
