"""The scaling of `predict --engine ray`, and the pools of members that pay.

    python benchmarks/cluster.py --model-dir BUNDLE --input texts.jsonl

Clusters of 1 to 8 machines are simulated on this one, with a raylet for each. Ray, the files, pickling and writing are
real; what the members compute is replaced by waiting as long as it took, measured first on one thread. The real members
run for comparison on one and two machines with a CPU each. Needs the extra ray.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import ray
from common import RESULTS, run_command
from ray.cluster_utils import Cluster

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.cluster import RemoteBundle, shared
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.step import Journey
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.jobs import ray_job
from cascade_rt.jobs.answering import CHUNK, Counts
from cascade_rt.jobs.ray_job import JobSettings, Pool, predict_on_cluster
from cascade_rt.types import Text

_CPUS = 2  # of a simulated machine
_MIDDLE = 0.2, 0.8  # of the texts, between which the rate is taken


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread takes."""

    tokenization: float
    """Seconds per text."""
    members: Sequence[float]
    """Seconds per text that reaches the member."""
    reached: Sequence[float]
    """Share of the texts that reach it."""

    def per_text(self, member: int) -> float:
        """Return the seconds of a member per text of the input; the first one tokenizes."""
        return self.reached[member] * self.members[member] + (0 if member else self.tokenization)

    def total(self) -> float:
        """Return the seconds of all members per text of the input."""
        return sum(self.per_text(member) for member in range(len(self.members)))


class Simulated(CascadeRuntime):
    """Waits as long as the members take, and lets as many texts leave."""

    costs: Costs
    prepared: Journey | None = None

    def begin(self, texts: Iterable[Text]) -> Journey:
        """Wait as long as tokenization takes; return a journey of as many texts."""
        some = list(texts)
        if self.prepared is None or len(self.prepared.exits) != len(some):
            self.prepared = super().begin(some)
        else:
            time.sleep(self.costs.tokenization * len(some))
        return copy.deepcopy(self.prepared)

    def advance(self, journey: Journey, member: int, stage: Stage | None = None) -> None:
        """Wait as long as a member takes; of the texts that reach it, let the measured share leave."""
        waiting, last = journey.waiting, len(self.costs.members) - 1
        time.sleep(self.costs.members[member] * len(waiting))
        stay = 0.0 if member == last else self.costs.reached[member + 1] / self.costs.reached[member]
        kept = round(stay * len(waiting))
        journey.probabilities[waiting] = 1 / journey.probabilities.shape[1]
        journey.exits[waiting[kept:]] = member
        journey.waiting = waiting[:kept]


@dataclass(frozen=True)
class SimulatedRemote(RemoteBundle):
    """Opens a simulated runtime."""

    costs: Costs | None = None

    def open(
        self, execution: Execution, *, verify: bool = True, members: Sequence[str] | None = None
    ) -> CascadeRuntime:
        """Open it; no member is loaded."""
        runtime = replace(self.recipe, execution=execution, verify=verify).open(Simulated)
        assert self.costs is not None
        assert isinstance(runtime, Simulated)
        runtime.costs = self.costs
        return runtime


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with CascadeRuntime(options.model_dir, threads=1, thresholds=options.threshold) as runtime:
        texts = [example.text for example in read_examples(options.input, pair=runtime.bundle.pair)]
        costs = measured_costs(runtime, texts[: options.measured])
        names = [member.name for member in runtime.bundle.members]
        report: dict[str, Any] = {
            "machine": describe() | {"ray": ray.__version__},
            "bundle": str(options.model_dir),
            "members": [f"{entry.name} {entry.precision}" for entry in runtime.bundle.members],
            "thresholds": runtime.thresholds,
            "costs": {
                "tokenization_ms": 1000 * costs.tokenization,
                "member_ms": [1000 * seconds for seconds in costs.members],
                "reached": list(costs.reached),
            },
            "simulated": [],
            "real": [],
        }
        print(report["costs"])
        for nodes in options.nodes:
            for pools in ({}, split(costs, names, nodes * _CPUS)):
                actors = nodes * _CPUS
                ideal = rate_of(costs, names, pools, actors)
                count = _rounded(ideal * options.seconds, options.shard_rows)
                row = run(runtime, texts, count, pools or Pool(actors), nodes, _CPUS, options.shard_rows, costs)
                _add(report["simulated"], row, nodes, pools, actors, ideal, count)
        for nodes in options.real_nodes:
            count = _rounded(nodes * options.real_seconds / costs.total(), options.shard_rows)
            row = run(runtime, texts, count, Pool(nodes), nodes, 1, options.shard_rows, None)
            _add(report["real"], row, nodes, {}, nodes, nodes / costs.total(), count)
    write_json(options.output, report)


def measured_costs(runtime: CascadeRuntime, texts: Sequence[Text]) -> Costs:
    """Time the steps of the runtime on chunks of texts; return medians."""
    members = range(len(runtime.bundle.members))
    begins, steps, reached = list[float](), [list[float]() for _ in members], [0 for _ in members]
    for start in range(0, len(texts) - CHUNK + 1, CHUNK):
        chunk = texts[start : start + CHUNK]
        started = time.perf_counter()
        journey = runtime.begin(chunk)
        begins.append((time.perf_counter() - started) / CHUNK)
        for member in members:
            if not (waiting := len(journey.waiting)):
                break
            started = time.perf_counter()
            runtime.advance(journey, member)
            steps[member].append((time.perf_counter() - started) / waiting)
            reached[member] += waiting
    total = CHUNK * len(begins)
    return Costs(median(begins), [median(each[1:]) for each in steps], [count / total for count in reached])


def split(costs: Costs, names: Sequence[str], actors: int) -> dict[str, Pool]:
    """Divide actors among the members so that the slowest pool is as fast as it can be."""
    counts = [1] * len(names)
    while sum(counts) < actors:
        slowest = min(range(len(names)), key=lambda member: counts[member] / costs.per_text(member))
        counts[slowest] += 1
    return {name: Pool(count) for name, count in zip(names, counts, strict=True)}


def rate_of(costs: Costs, names: Sequence[str], pools: Mapping[str, Pool], actors: int) -> float:
    """Return the texts per second without any overhead."""
    if not pools:
        return actors / costs.total()
    return min((pools[name].actors or 1) / costs.per_text(member) for member, name in enumerate(names))


def run(
    runtime: CascadeRuntime,
    texts: Sequence[Text],
    count: int,
    pools: Pool | Mapping[str, Pool],
    nodes: int,
    cpus: int,
    shard_rows: int,
    costs: Costs | None,
) -> dict[str, Any]:
    """Run one job on a new cluster; return its time, its rate in the middle, and the load of this machine."""
    marks: list[tuple[int, float, float]] = []
    counts = Counts()
    with TemporaryDirectory() as folder, _machines(nodes, cpus), _members_as(costs):
        source = Path(folder) / "in.jsonl"
        with source.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in islice(cycle(texts), count))
        started = time.perf_counter()
        predict_on_cluster(
            runtime,
            str(source),
            str(Path(folder) / "out"),
            counts,
            JobSettings(pools=pools, shard_rows=shard_rows),
            progress=lambda _: marks.append((counts.records, time.perf_counter(), _busy())),
        )
        seconds = time.perf_counter() - started
    first, last = (next(mark for mark in marks if mark[0] >= share * count) for share in _MIDDLE)
    middle = last[1] - first[1]
    return {
        "seconds": seconds,
        "first_answers": marks[0][1] - started,
        "rate": (last[0] - first[0]) / middle,
        "busy_cpus": (last[2] - first[2]) / middle,
    }


@contextmanager
def _machines(nodes: int, cpus: int) -> Iterator[None]:
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            machines.add_node(num_cpus=cpus)
        ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        machines.shutdown()


@contextmanager
def _members_as(costs: Costs | None) -> Iterator[None]:
    """Let jobs in the block open simulated runtimes; None for the real ones."""

    def simulated(runtime: CascadeRuntime) -> RemoteBundle:
        return SimulatedRemote(**vars(shared(runtime)), costs=costs)

    with nullcontext() if costs is None else patch.object(ray_job, "shared", simulated):
        yield


def _busy() -> float:
    """Return the seconds that the CPUs of this machine have computed since it started."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _rounded(count: float, shard_rows: int) -> int:
    return max(10, round(count / shard_rows)) * shard_rows


def _add(
    rows: list[dict[str, Any]],
    row: dict[str, Any],
    nodes: int,
    pools: Mapping[str, Pool],
    actors: int,
    ideal: float,
    count: int,
) -> None:
    pool = {name: pool.actors for name, pool in pools.items()} or actors
    rows.append({"nodes": nodes, "actors": pool, "texts": count, "ideal_rate": ideal, **row})
    print(
        f"{nodes} nodes, actors {pool}: {count:,} texts in {row['seconds']:.1f} s, first after "
        f"{row['first_answers']:.1f} s; {row['rate']:,.0f} texts/s, {row['rate'] / ideal:.1%} of {ideal:,.0f}; "
        f"{row['busy_cpus']:.2f} CPUs busy",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--input", required=True, help="texts, repeated as needed")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=40.0, help="of each simulated job without overhead")
    parser.add_argument("--real-nodes", type=int, nargs="*", default=[1, 2], help="with a CPU each")
    parser.add_argument("--real-seconds", type=float, default=25.0)
    parser.add_argument("--measured", type=int, default=12 * CHUNK, help="texts that the costs are measured on")
    parser.add_argument("--shard-rows", type=int, default=2 * CHUNK)
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster.json")
    return parser


if __name__ == "__main__":
    run_command(main)
