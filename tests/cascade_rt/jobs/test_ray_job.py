"""Jobs on a Ray cluster of several machines (raylets here): equal to one process, also where some of it dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeError, CascadeRuntime, InputError, cluster
from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.io.readers import read_examples
from cascade_rt.jobs.answering import Counts
from cascade_rt.jobs.ray_job import JobSettings, Pool, predict_on_cluster

from ...toy import WORDS

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore::FutureWarning:ray.*"),
]

MEMBERS = ("tiny", "small", "big")
POOLS: Mapping[str, Any] = {"all members": Pool(4), "member pools": dict.fromkeys(MEMBERS, Pool(1))}


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of two machines with a CPU each, and the driver's with another."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        machines.add_node(num_cpus=1)
        machines.add_node(num_cpus=1)
        ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
        yield machines
        ray.shutdown()
        machines.shutdown()


def write_texts(path: Path, count: int, seed: int = 0, bad: Callable[[int], bool] = lambda row: False) -> Path:
    draw = random.Random(seed)
    with path.open("w") as stream:
        for row in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
            stream.write("{broken\n" if bad(row) else json.dumps({"id": row, "text": text}) + "\n")
    return path


def in_one_process(bundle: Path, source: Path | str, *options: str) -> list[dict[str, Any]]:
    main(["predict", "--model-dir", str(bundle), "--input", str(source), "--output", "one.jsonl", *options])
    return rows(Path("one.jsonl"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def answers(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in shards(folder) for row in rows(shard)]


def assert_equal(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Text by text; scores as close as fp32 promises, whatever the batch."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if one != other:
            assert one == {**other, "score": pytest.approx(other["score"], abs=1e-5)}


def kill_an_actor() -> None:
    """Kill one of the processes that answer texts, as if memory had run out."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::MapWorker"):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("found no actor")


def check_kills(machines: Any, bundle: Path, source: Path, kind: str, count: int, shard_rows: int) -> None:
    """Run a job of which an actor and a machine die, and compare with one process."""
    doomed = machines.add_node(num_cpus=2)
    runtime = CascadeRuntime(bundle)
    counts, seen = Counts(), list[int]()

    def disturb(_: object) -> None:
        seen.append(counts.records)
        if len(seen) == 4:
            kill_an_actor()
        if len(seen) == 8:
            machines.remove_node(doomed, allow_graceful=False)

    settings = JobSettings(pools=POOLS[kind], shard_rows=shard_rows)
    predict_on_cluster(runtime, str(source), "out", counts, settings, progress=disturb)
    assert counts == Counts(count)
    assert seen == list(range(shard_rows, count + 1, shard_rows)), "in order, each part once"
    found = answers(Path("out"))
    assert [row["id"] for row in found] == list(range(count)), "nothing is lost or doubled"
    assert_equal(found, in_one_process(bundle, source, "--threads", "1"))
    exits = [row["exit"] for row in found]
    assert runtime.stats().exits == [exits.count(exit) for exit in range(3)]
    summary = json.loads(Path("out/_SUCCESS").read_text())
    assert (summary["answered"], summary["rejected"], summary["exits"]) == (count, 0, runtime.stats().exits)


def test_a_killed_actor_and_a_killed_machine(machines: Any, bundle: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.jsonl", 20_000)
    check_kills(machines, bundle, source, "member pools", 20_000, shard_rows=1000)


@pytest.mark.real_data
@pytest.mark.parametrize("kind", POOLS)
def test_200_000_real_texts_with_a_killed_actor_and_a_killed_machine(
    machines: Any, bundle: Path, tmp_path: Path, real_data: Callable[[str], Path], kind: str
) -> None:
    sentences = [example.text for example in read_examples(real_data("sst2") / "train.tsv", pair=False)]
    with (tmp_path / "in.jsonl").open("w") as stream:
        for row, text in enumerate(islice(cycle(sentences), 200_000)):
            stream.write(json.dumps({"id": row, "text": text}) + "\n")
    check_kills(machines, bundle, tmp_path / "in.jsonl", kind, 200_000, shard_rows=5000)


@pytest.mark.parametrize("kind", POOLS)
def test_long_texts_are_read_in_windows_everywhere(machines: Any, bundle: Path, tmp_path: Path, kind: str) -> None:
    draw = random.Random(2)
    with (tmp_path / "in.jsonl").open("w") as stream:
        for row in range(300):
            stream.write(json.dumps({"id": row, "text": " ".join(draw.choices(WORDS, k=draw.randint(1, 90)))}) + "\n")
    runtime, counts = CascadeRuntime(bundle, stride=4, aggregate="max"), Counts()
    settings = JobSettings(pools=POOLS[kind], shard_rows=70)
    predict_on_cluster(runtime, str(tmp_path / "in.jsonl"), "out", counts, settings)
    found = answers(Path("out"))
    options = ("--stride", "4", "--aggregate", "max", "--threads", "1")
    assert_equal(found, in_one_process(bundle, tmp_path / "in.jsonl", *options))
    assert not any(row["truncated"] for row in found)
    assert runtime.stats().mean_layers == pytest.approx(sum(row["layers"] for row in found) / len(found))
    with pytest.raises(InputError, match=r"another stride \(found 4, expected None\)"):
        again = replace(settings, resume=True)
        predict_on_cluster(runtime.with_stride(None), str(tmp_path / "in.jsonl"), "out", Counts(), again)


@pytest.mark.parametrize(("on_error", "kind"), [("skip", "all members"), ("null", "member pools")])
def test_the_error_rules_of_one_process(
    machines: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_error: str, kind: str
) -> None:
    """Over several files, with bad rows, wrong texts and a file without a row."""
    (tmp_path / "in").mkdir()
    write_texts(tmp_path / "in" / "a.jsonl", 700, seed=1, bad=lambda row: row % 97 == 5)
    (tmp_path / "in" / "b.jsonl").touch()
    write_texts(tmp_path / "in" / "c.jsonl", 90, seed=2, bad=lambda row: row > 85)
    (tmp_path / "in" / "d.txt").write_bytes(b"the film\n\xff\nso sad\n")
    rules = ["--on-error", on_error, "--rejects"]
    wanted = in_one_process(bundle, tmp_path / "in", *rules, "rejects.jsonl")
    one = capsys.readouterr().err
    pools = [] if kind == "all members" else [f"--pool={member}=1" for member in MEMBERS]
    cluster = ["--engine", "ray", "--shard-rows", "300", *pools]
    command = ["predict", "--model-dir", str(bundle), "--input", "in", "--output", "out", *rules, "rejects2.jsonl"]
    status = main([*command, *cluster])
    assert status == (0 if on_error == "skip" else 2)
    assert capsys.readouterr().err.replace("rejects2", "rejects") == one, "the same exits, counts and error"
    assert_equal(answers(Path("out")), wanted)
    assert [path.name for path in shards(Path("out"))] == [
        "part-00000-000000.jsonl",
        "part-00000-000001.jsonl",
        "part-00000-000002.jsonl",
        "part-00002-000000.jsonl",
        "part-00003-000000.jsonl",
    ]
    expected = [{**row, "where": row["where"].replace("in/", f"{tmp_path}/in/")} for row in rows(Path("rejects.jsonl"))]
    named = [{**row, "where": row["where"].replace(f"{tmp_path}/{tmp_path}", str(tmp_path))} for row in expected]
    assert rows(Path("rejects2.jsonl")) == named


def test_a_bad_row_stops_the_job_after_the_rows_before_it_and_resume_goes_on(
    machines: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_texts(tmp_path / "in.jsonl", 2000, bad=lambda row: row == 1234)
    command = ["predict", "--model-dir", str(bundle), "--input", str(source), "--output", "out", "--engine", "ray"]
    command += ["--shard-rows", "100"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{source}:1235: not JSON" in error
    assert error.endswith("the answers before it are in out, and --resume goes on after 1,200 rows\n")
    assert [path.name for path in shards(Path("out"))][:12] == [f"part-00000-{at:06d}.jsonl" for at in range(12)]
    assert not Path("out/part-00000-000012.jsonl").exists()
    assert not Path("out/_SUCCESS").exists()

    assert main(command) == 2
    assert "found the answers of an earlier run there" in capsys.readouterr().err
    assert main([*command, "--resume", "--threshold", "0.3"]) == 2
    assert "is of a run with another thresholds (found [0.8, 0.8], expected [0.3, 0.3])" in capsys.readouterr().err

    write_texts(source, 2000)
    kept = {path.name: path.stat().st_mtime_ns for path in shards(Path("out"))[:12]}
    shutil.copy("out/part-00000-000003.jsonl", "whole.jsonl")
    Path("out/part-00000-000003.jsonl").unlink()
    Path("out/part-00000-000004.jsonl").write_text("cut short")
    Path("out/.part-00000-000005.jsonl.0123").touch()
    assert main([*command, "--resume"]) == 0
    assert_equal(answers(Path("out")), in_one_process(bundle, source))
    assert Path("out/part-00000-000003.jsonl").read_text() == Path("whole.jsonl").read_text()
    new = {name for name, time in kept.items() if (Path("out") / name).stat().st_mtime_ns != time}
    assert new == {"part-00000-000003.jsonl", "part-00000-000004.jsonl"}, "whole shards are not made again"
    assert not Path("out/.part-00000-000005.jsonl.0123").exists()

    write_texts(source, 150, seed=3)
    assert main([*command, "--resume"]) == 0
    assert_equal(answers(Path("out")), in_one_process(bundle, source))
    assert len(shards(Path("out"))) == 2, "shards of rows that the input no longer has are gone"


@pytest.mark.parametrize("format", ["parquet", "jsonl.gz"])
def test_other_formats_and_compressed_input(machines: Any, bundle: Path, tmp_path: Path, format: str) -> None:
    import pyarrow.dataset

    write_texts(tmp_path / "in.jsonl", 300)
    wanted = in_one_process(bundle, tmp_path / "in.jsonl")
    runtime = CascadeRuntime(bundle)
    source = f"file://{tmp_path}/in*.jsonl"
    settings = JobSettings(shard_rows=128, shard_format=format)
    predict_on_cluster(runtime, source, f"file://{tmp_path}/out", Counts(), settings)
    kind = "json" if format == "jsonl.gz" else format
    found = pyarrow.dataset.dataset(tmp_path / "out", format=kind).to_table().to_pylist()
    assert_equal(sorted(found, key=lambda row: row["id"]), wanted)


def test_patience_members_and_thresholds_go_along(
    machines: Any, four_segments: Path, bundle: Path, tmp_path: Path
) -> None:
    source = write_texts(tmp_path / "in.jsonl", 200)
    some = CascadeRuntime(bundle, members=["small", "big"], thresholds=0.7)
    pools: list[Any] = [Pool(1), {"small": Pool(1), "big": Pool(1)}]
    for runtime, kind in zip((CascadeRuntime(four_segments).with_patience(2), some), pools, strict=True):
        wanted = runtime.predict([row["text"] for row in rows(source)])
        settings = JobSettings(pools=kind, shard_rows=150)
        predict_on_cluster(runtime, str(source), runtime.bundle.members[0].name, Counts(), settings)
        found = answers(Path(runtime.bundle.members[0].name))
        assert [(row["label"], row["exit"], row["layers"]) for row in found] == [
            (one.label, one.exit, one.layers) for one in wanted
        ]
        assert runtime.stats().texts == 400


def test_a_bundle_goes_to_machines_that_do_not_have_it(
    machines: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runtime = CascadeRuntime(bundle, thresholds=0.7)
    remote = cluster.shared(runtime)
    remote = replace(remote, recipe=replace(remote.recipe, model_dir=str(tmp_path / "elsewhere")))
    execution = Execution(threads=1)
    texts = ["a good film", "so sad"]
    for _ in range(2):
        assert remote.open(execution).predict(texts) == runtime.predict(texts)
    (kept,) = tmp_path.glob("cascade-rt-*/*")
    assert (kept / "cascade.json").is_file()
    (kept / "tokenizer.json").unlink()  # as a system may do with old files in such folders
    assert remote.open(execution).predict(texts) == runtime.predict(texts)
    assert list(kept.parent.iterdir()) == [kept]

    with pytest.raises(CascadeError, match=r"found cascade-rt \S+ on a machine of the cluster, expected 0\.0, as here"):
        replace(remote, version="0.0").open(execution)


def test_each_member_may_have_its_own_provider(machines: Any, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    source = write_texts(tmp_path / "in.jsonl", 300)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    pools = {"tiny": Pool(1), "small": Pool(1, "openvino", 1, options), "big": Pool(1)}
    predict_on_cluster(CascadeRuntime(bundle), str(source), "out", Counts(), JobSettings(pools=pools))
    assert_equal(answers(Path("out")), in_one_process(bundle, source))
    pools["small"] = Pool(1, "openvino", 1, {"NO_PRECISION": "f32"})
    with pytest.raises(InputError, match="NO_PRECISION"):
        predict_on_cluster(CascadeRuntime(bundle), str(source), "wrong", Counts(), JobSettings(pools=pools))


def test_an_error_of_a_runtime_ends_the_job_with_its_message(machines: Any, copied: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.jsonl", 100)
    runtime = CascadeRuntime(copied)
    (copied / "tiny.onnx").write_bytes(b"")
    with pytest.raises(CascadeError, match="tiny.onnx: truncated or altered"):
        predict_on_cluster(runtime, str(source), "out", Counts())
    assert not shards(Path("out"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pools": {"tiny": Pool()}}, "`pools`: found 'tiny', expected each member once: tiny, small, big"),
        ({"pools": Pool(0)}, "`actors`: found 0, expected a whole number from 1"),
        ({"pools": Pool(threads=0)}, "`threads`: found 0"),
        ({"pools": Pool(provider="gpu")}, "`provider`: found 'gpu', expected cpu, cuda, openvino or"),
        ({"shard_rows": 0}, "`shard_rows`: found 0, expected a whole number from 1"),
        ({"shard_format": "xml"}, "`shard_format`: found 'xml', expected one of jsonl, "),
        ({"on_error": "ask"}, "`on_error`: found 'ask'"),
    ],
)
def test_wrong_options_leave_nothing(bundle: Path, tmp_path: Path, options: Mapping[str, Any], error: str) -> None:
    source = write_texts(tmp_path / "in.jsonl", 10)
    with pytest.raises(InputError) as found:
        predict_on_cluster(CascadeRuntime(bundle), str(source), "out", Counts(), JobSettings(**options))
    assert str(found.value).startswith(error)
    assert not Path("out").exists()
