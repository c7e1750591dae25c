"""The benchmark commands run end to end on tiny bundles. What they measure is not asserted: machines differ."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeRuntime

from .conftest import LABELS, WORDS, make_member

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


def test_families_take_turns() -> None:
    report = run("families.py", "--layers", 1, "--hidden", 64, "--tokens", 8, "--texts", 2, "--rounds", 2)
    rows = report["families"]
    assert {"bert", "modernbert", "deberta-v3"} <= rows.keys()
    flops = {family: row["gflops_of_128_tokens"] for family, row in rows.items()}
    assert flops["modernbert"] == pytest.approx(flops["bert"], rel=0.02)
    assert flops["deberta-v3"] > 1.1 * flops["bert"]
    for row in rows.values():
        for precision in ("fp32", "int8"):
            assert row[precision]["operators"] > 10
            assert row[precision]["8_tokens"]["ms"] > 0


def test_long_texts_are_made_and_answered(bundle: Path, tmp_path: Path) -> None:
    rows = [f"{WORDS[at % 40]} {WORDS[at % 7]},{LABELS[at % 3]}" for at in range(120)]
    (tmp_path / "opinions.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (tmp_path / "filler.txt").write_text("".join(f"{one} {other}\n" for one in WORDS for other in WORDS[:5]))
    data = ["--opinions", tmp_path / "opinions.csv", "--filler", tmp_path / "filler.txt"]
    size = ["--texts", 3, "--timed", 1, "--tokens", 60, "--stride", 8]
    report = run("long_texts.py", "--model-dir", bundle, *data, *size)
    for found in report["kinds"].values():
        assert [row["truncated"] for row in found.values()] == [3, 3, 0, 0]
        assert found["big alone, cut"]["mean_layers"] == 4
        assert all(sum(row["exits"]) == 3 for row in found.values())


@pytest.mark.slow
def test_peers_meet_in_one_run(member_folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    rows = [f"{WORDS[index]} {WORDS[-index]},{LABELS[index % 3]}" for index in range(20)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    members = [argument for folder in member_folders[1:] for argument in ("--member", folder)]
    small = ["--texts", 20, "--rounds", 1, "--max-length", 32, "--speedup", 1.5, "--starts", 1]
    report = run("peers.py", *members, "--data", "data.csv", *small)
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
    ours = [name for name in contestants if name.startswith("cascade-rt") and name.endswith(", big alone")]
    assert len(ours) == 4, "on both engines, each in two precisions"
    assert report["cold_start"]["times_faster"]["median"] > 0
    tuned = run("peers.py", *members[-2:], "--data", "data.csv", *small, "--tuned", "runs/peers/bundle-int8")
    rows = tuned["contestants"]
    alone = {f"cascade-rt, {folder.name} alone" for folder in member_folders[1:]}
    (cascade,) = {name for name in rows if name.startswith("cascade-rt")} - alone
    assert cascade.startswith("cascade-rt, cascade bundle-int8: ")
    assert all(0 < row["single"]["p50_ms"] <= row["single"]["p95_ms"] for row in rows.values())


def test_operators_have_shares_of_the_time(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "texts.txt").write_text("\n".join(f"{word} film" for word in WORDS[:20]))
    report = run("operators.py", "--model-dir", bundle, "--data", "texts.txt", "--single", 3, "--rounds", 1)
    assert [(row["member"], row["way"]) for row in report["members"]] == [
        (member, way) for member in ("tiny", "small", "big") for way in ("single", "bulk")
    ]
    for row in report["members"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"]["products"] > 0
        assert row["ms"] > 0
    assert Path("report.svg").stat().st_size > 5000


@pytest.mark.slow
def test_exporters_are_compared_on_one_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    report = run("exporters.py", "--random", "2x64", "--rounds", 2)
    assert report["trace"]["fused"]["Attention"] == 2
    assert report["trace"]["operators"] < report["dynamo"]["operators"]
    for row in report["times"]:
        assert row["max_logit_difference"] < 1e-4
        assert row["ratio_of_medians"] > 0


def test_blind_texts_are_answered_in_order(bundle: Path, tmp_path: Path) -> None:
    texts = [" ".join(WORDS[row : row + 3]) for row in range(30)]
    (tmp_path / "toy.txt").write_text("\n".join(texts))
    command = [sys.executable, str(BENCHMARKS / "blind.py"), "--model-dir", str(bundle), "--texts", "toy.txt"]
    subprocess.run([*command, "--name", "tiny", "--built", "by hand", "--output", "out"], check=True)
    answers = [json.loads(line) for line in Path("out/toy-tiny.jsonl").read_text("utf-8").splitlines()]
    with CascadeRuntime(bundle) as runtime:
        expected = runtime.predict(texts)
        alone = [runtime.with_members([entry.name]).predict(texts) for entry in runtime.bundle.members]
    for row, (answer, found) in enumerate(zip(answers, expected, strict=True)):
        assert (answer["label"], answer["exit"]) == (found.label, found.exit)
        assert answer["members"] == [member[row].label for member in alone]
    written = Path("out/toy-tiny.json").read_text("utf-8")
    assert "sha256" not in written
    assert json.loads(written)["milliseconds_per_text"].keys() == {"cascade", "big"}


@pytest.fixture
def task(tmp_path: Path) -> list[object]:
    """A learnable task as a benchmark's options."""
    fillers = [word for word in WORDS if word not in {"good", "bad"}]
    rows = [
        f"{fillers[row % 31]} {('bad', 'good')[row % 2]} {fillers[row * 7 % 37]} {fillers[row // 31 % 37]},{row % 2}"
        for row in range(1300)
    ]
    (tmp_path / "train.csv").write_text("\n".join(["text,category", *rows]))
    recipe = ["--epochs", 1, "--learning-rate", 1e-3, "--big-learning-rate", 1e-3, "--max-length", 16]
    return ["--task", "banking77", "--data", tmp_path, *recipe]


@pytest.mark.slow
def test_all_systems_go_from_training_to_figures(task: list[object], tmp_path: Path) -> None:
    big, small, distilled = (
        make_member(tmp_path / f"base-{seed}", layers=layers, spread=0.05, seed=seed)
        for seed, layers in enumerate((4, 1, 2))
    )
    models = ["--base", big, "--complete", f"1={small}", "--distilled", distilled, "--first", 2, "--compressed", 2]
    options = ["--big-epochs", 1, "--batch-size", 64, "--work", tmp_path / "work"]
    report = run("systems.py", *task, *models, *options)
    (seed,) = report["seeds"]
    alone = {"big model", "BERT-2L", "complete 1L", "BERT-PD 1L", "BERT-PKD 2L", "BERT-of-Theseus 2L", "DistilBERT 2L"}
    multi_exit, cascades = {"DeeBERT", "PABEE", "FastBERT"}, {"CascadeBERT", "CascadeBERT, distilled"}
    assert seed["systems"].keys() == alone | multi_exit | cascades
    for name, points in seed["systems"].items():
        assert points.keys() >= ({"alone"} if name in alone | {"PABEE"} else {"1.5x", "2x"})
        for point in points.values():
            assert point["bulk_speedup"]["median"] > 0
            assert sum(point["exits"]) == report["rows"]["reported"]
    assert seed["systems"]["big model"]["alone"]["layer_speedup"] == 1
    assert seed["systems"]["BERT-2L"]["alone"]["layer_speedup"] == 2
    assert seed["systems"]["DeeBERT"]["alone"]["layer_speedup"] == 1
    assert seed["systems"]["DeeBERT"]["alone"]["flops_speedup"] < 1, "the exits are counted"
    by_layer = seed["by_layer"]
    assert by_layer.keys() == {"BERT-kL", "complete", *multi_exit}
    assert by_layer["DeeBERT"].keys() == {"1", "2", "3", "4"}
    assert by_layer["BERT-kL"].keys() == {"2", "4"}
    emitted = [row["emitted_texts"] for row in by_layer["DeeBERT"].values()]
    assert sum(emitted) == report["rows"]["reported"]
    assert by_layer["DeeBERT"]["4"]["accuracy"] == by_layer["BERT-kL"]["4"]["accuracy"], (
        "its last exit is the big model"
    )
    for picture in ("report.svg", "report-layers.svg", "report-dis.svg"):
        assert Path(picture).stat().st_size > 5000


@pytest.mark.slow
def test_results_go_from_training_to_figures(task: list[object], tmp_path: Path) -> None:
    bases = [make_member(tmp_path / f"base-{layers}", layers=layers, spread=0.05) for layers in (4, 1)]
    members = ["--base", f"4L={bases[0]}", "--base", f"1L={bases[1]}"]
    dar = ["--dar", "--folds", 2, "--label-seeds", 1]
    report = run("results.py", *task, *members, "--truncated", 2, "--seeds", 2, *dar, "--work", tmp_path / "work")
    small = {"1L", "2L truncated", "1L, DAR", "1L, KD + DAR"}
    assert [seed["alone"].keys() for seed in report["seeds"]] == [small | {"4L"}] * 2
    assert report["seeds"][0]["alone"]["4L"] == report["seeds"][1]["alone"]["4L"], "one seed of the biggest"
    assert report["recipes"]["1L"]["learning_rate"] == 2e-3
    assert report["rows"]["reported"] == 176
    for seed in report["seeds"]:
        assert seed["cascades"].keys() == {f"{name} + 4L" for name in small}
        assert all(0 <= member["ece_scaled"] <= 1 for member in seed["alone"].values())
        assert seed["cascades"]["1L + 4L"].keys() == {"2", "3", "4"}
        assert seed["cascades"]["2L truncated + 4L"].keys() == {"2"}
    for precision in ("fp32", "int8"):
        ways = report["exported"][precision]["ways"]
        assert {"1L-0", "4L-0", "2x by layers"} <= ways.keys()
        assert ways["4L-0"]["layers"] == 4
        assert ways["4L-0"]["bulk_speedup"]["median"] == 1
    members = [f"--member={name}={tmp_path / 'work' / name}-0" for name in ("4L", "1L")]
    sizes = ["--seeds", 2, "--epochs", 2, "--buckets", 512, "--dimension", 16, "--augment", 1, "--distill-weight", 0.5]
    report = run("zero_layers.py", *task[:4], *members, *sizes, "--work", tmp_path / "zero")
    assert report["network"]["buckets"] == 512
    for seed in report["seeds"]:
        assert {"DAN", "1L-0", "4L-0", "DAN + 4L-0, -1", "DAN + 1L-0 + 4L-0, 5x"} <= seed["ways"].keys()
        assert seed["ways"]["4L-0"] == report["seeds"][0]["ways"]["4L-0"]
        assert seed["ways"]["DAN"]["flops_speedup"] > 10
    assert report["seeds"][0]["times"]["DAN"]["single_p50_ms"] > 0


def test_single_file_compares_answers_and_times(bundle: Path) -> None:
    report = run("single_file.py", "--model-dir", bundle, "--texts", 40, "--timed", 8, "--rounds", 2)
    assert report["equality"] == {"texts": 40, "equal_bits": 40, "equal_exits": 40}
    assert report["one_file_over_runtime"].keys() == {"single", "batches of 32"}


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that simulates a cluster."""
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cluster")


def test_a_cluster_is_planned_and_prices_follow(
    simulation: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the jobs themselves, which start clusters."""
    jobs = []

    def run(*arguments: Any) -> dict[str, float]:
        jobs.append(arguments[2:6])
        return {"seconds": 2.0, "first_answers": 1.0, "rate": 100.0, "busy_cpus": 1.0}

    monkeypatch.setattr(simulation, "run", run)
    Path("in.txt").write_text("\n".join(" ".join(WORDS[at % 7 : at % 7 + 1 + at % 9]) for at in range(3000)))
    options = [
        "--nodes",
        "1",
        "2",
        "--real-nodes",
        "1",
        "--seconds",
        "1",
        "--shard-rows",
        "256",
        "--output",
        "report.json",
    ]
    monkeypatch.setattr(sys, "argv", ["cluster.py", "--model-dir", str(bundle), "--input", "in.txt", *options])
    simulation.main()
    report = json.loads(Path("report.json").read_text("utf-8"))
    assert report["costs"]["reached"][0] == 1
    assert [row["nodes"] for row in report["simulated"]] == [1, 1, 2, 2]
    assert [row["actors"] for row in report["simulated"][::2]] == [2, 4]
    assert sum(report["simulated"][3]["actors"].values()) == 4
    assert [nodes for *_, nodes, _ in jobs] == [1, 1, 2, 2, 1]
    prices = ["--gpu-speedup", 1, 2, 3, "--core-price", 1, "--gpu-price", 2.5]
    command = [sys.executable, BENCHMARKS / "pool_costs.py", "--costs", "report.json", *prices]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 9
    assert done.stdout.splitlines()[0].endswith("member pools  tiny on CPU, small on CPU, big on GPU")


def test_a_simulated_runtime_lets_as_many_texts_leave(simulation: Any, bundle: Path) -> None:
    runtime = simulation.Simulated(bundle)
    runtime.costs = simulation.Costs(1e-6, [1e-6, 1e-6, 1e-6], [1.0, 0.5, 0.1])
    for _ in range(2):
        journey = runtime.begin(["a film"] * 200)
        for member in range(3):
            runtime.advance(journey, member)
        assert len(runtime.finish(journey)) == 200
    assert runtime.stats().exits == [200, 160, 40]


def test_the_cheapest_placement_is_that_of_each_member_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pool_costs

    prices = pool_costs.Prices(core=0.05, gpu=1.0)
    draw = random.Random(0)
    for _ in range(200):
        seconds = [draw.random() for _ in range(3)]
        speedups = [draw.uniform(1, 40) for _ in seconds]
        (cheapest, places), *others = pool_costs.placements(seconds, speedups, prices, sending=0.0)
        assert list(places) == ["GPU" if speedup > 20 else "CPU" for speedup in speedups]
        each = [min(one * 0.05, one / speedup) for one, speedup in zip(seconds, speedups, strict=True)]
        assert cheapest == pytest.approx(sum(each) * 1e6 / 3600)
        assert [total for total, _ in others] == sorted(total for total, _ in others)
        sent = pool_costs.placements(seconds, speedups, prices, sending=1e9)
        assert sent[0][1] in (("CPU",) * 3, ("GPU",) * 3), "where sending costs too much, one pool is the cheapest"
