"""The folder of shards, and what is refused before a cluster has work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascade_rt import InputError
from cascade_rt.jobs.ray_job import Pool, _check_room, _resources
from cascade_rt.jobs.shards import ENDINGS, Receipt, ShardFolder

pytest.importorskip("pyarrow")

JOB = {"bundle": "b", "shard_rows": 10}
LINES = '{"text": "a", "label": "good"}\n{"text": "\ud800", "label": null}\n'


def written(folder: ShardFolder, part: str, digest: str = "d") -> Receipt:
    return folder.write(part, LINES, lambda size: Receipt(part, digest, size, 2, 0, [1, 1], ""))


def begun(target: str | Path, ending: str = "jsonl", *, resume: bool = False) -> ShardFolder:
    folder = ShardFolder(str(target), ending)
    folder.begin(JOB, resume=resume)
    return folder


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shard_has_a_receipt_while_it_is_whole(tmp_path: Path, ending: str, scheme: str) -> None:
    if ending == "jsonl.zst":
        pytest.importorskip("zstandard")
    folder = begun(f"{scheme}{tmp_path}/out", ending)
    assert folder.receipt("0", "d") is None
    receipt = written(folder, "0")
    shard = tmp_path / "out" / f"part-0.{ending}"
    assert receipt.bytes == shard.stat().st_size
    assert folder.receipt("0", "d") == receipt
    assert folder.receipt("0", "other") is None
    first = shard.read_bytes()
    written(folder, "0")
    assert shard.read_bytes() == first, "writing again changes nothing"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_JOB", "_receipts", shard.name]
    (tmp_path / "out" / "_receipts" / "0").write_text('{"part": "0", "digest": "d"}')
    assert folder.receipt("0", "d") is None
    written(folder, "0")
    shard.write_bytes(first[:-1])
    assert folder.receipt("0", "d") is None


def test_a_folder_is_complete_when_all_shards_are_there(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    first, second, _ = (written(folder, part) for part in ("0", "1", "9"))
    with pytest.raises(
        InputError, match=r"1 of 3 shards are not there, for instance part-2\.jsonl; name a folder that"
    ):
        folder.finish([first, second, first._replace(part="2")], {})
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    folder.finish([first, second], {"answered": 4})
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text()) == {"answered": 4}
    assert sorted(path.name for path in tmp_path.glob("out/part-*")) == ["part-0.jsonl", "part-1.jsonl"]

    with pytest.raises(InputError, match="found the answers of an earlier run there"):
        begun(tmp_path / "out")
    begun(tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / "_SUCCESS").exists(), "it is not complete while a job works on it"


def test_parquet_shards_have_the_same_columns(tmp_path: Path) -> None:
    """Also where a later shard has fields of other types, and where the job is resumed after that."""
    dataset = pytest.importorskip("pyarrow.dataset")
    parts: list[list[dict[str, Any]]] = [
        [{"id": 1, "x": 1, "label": "a"}, {"id": 2, "x": None, "label": "b"}],
        [{"id": 2**64 - 1, "x": 0.5, "new": {"y": [1]}, "label": "a"}],
        [{"id": 3, "x": 2, "label": None}],
    ]

    def write(folder: ShardFolder, at: int) -> Receipt:
        lines = "".join(json.dumps(row) + "\n" for row in parts[at])
        return folder.write(str(at), lines, lambda size: Receipt(str(at), "d", size, len(parts[at]), 0, [1], ""))

    def found() -> list[dict[str, Any]]:
        table = dataset.dataset(tmp_path / "out", format="parquet").to_table()
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    folder = begun(tmp_path / "out", "parquet")
    folder.finish([write(folder, at) for at in range(3)], {})
    rows = [row | {"x": row["x"], "new": row.get("new")} for part in parts for row in part]
    assert found() == [row | {"new": row["new"] and json.dumps(row["new"])} for row in rows]

    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    folder = begun(tmp_path / "out", "parquet", resume=True)
    receipts = [folder.receipt(str(at), "d") for at in range(3)]
    parts.append([{"id": -1, "x": "z", "label": "a"}])
    folder.finish([*(receipt for receipt in receipts if receipt), write(folder, 3)], {})
    assert [json.loads(row["id"]) for row in found()] == [1, 2, 2**64 - 1, 3, -1]
    assert [row["x"] and json.loads(row["x"]) for row in found()] == [1, None, 0.5, 2, "z"]
    assert found()[2]["new"] == '{"y": [1]}'
    assert all((tmp_path / "out" / name).read_bytes() != content for name, content in kept.items())


def test_other_folders_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="found other files there, expected a new or empty folder"):
        begun(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"cannot write .*notes\.txt/out .*; check the name and the access"):
        begun(tmp_path / "notes.txt" / "out")


def test_actors_on_a_gpu_reserve_one() -> None:
    assert _resources(Pool(threads=3)) == _resources(Pool(2, "CPUExecutionProvider", 3)) == {"num_cpus": 3}
    assert _resources(Pool(1, "openvino")) == {"num_cpus": 1}
    assert _resources(Pool(1, "cuda", 3)) == _resources(Pool(1, "ROCMExecutionProvider")) == {"num_gpus": 1}


def test_a_machine_alone_must_have_room(tmp_path: Path) -> None:
    def ray(*machines: dict[str, float]) -> Any:
        nodes = [{"Alive": True, "Resources": resources} for resources in machines]
        return SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 1.0}}])

    _check_room(ray({"CPU": 2.0}), [Pool(threads=2), Pool(99, threads=1)])
    _check_room(ray({"CPU": 2.0, "GPU": 1.0}), [Pool(provider="cuda")])
    _check_room(ray({"CPU": 2.0}, {}), [Pool(threads=3)])  # a cluster may grow
    with pytest.raises(
        InputError, match="`threads`: found 3, expected at most 2, the CPUs of the cluster's only machine"
    ):
        _check_room(ray({"CPU": 2.0}), [Pool(threads=3)])
    with pytest.raises(InputError, match="`provider`: found 'cuda', expected cpu: Ray knows no GPU"):
        _check_room(ray({"CPU": 2.0}), [Pool(), Pool(provider="cuda")])
