"""Latency and throughput of `cascade-rt serve` over offered load, against other ways to serve the same big model.

    python benchmarks/serving.py --model-dir BUNDLE --member DIR --data DATA/sst2/dev.tsv

All servers run in turn, each in a process of its own, on the CPUs that it and the client share. Requests carry one text
and arrive at random moments (Poisson), whether or not earlier ones are answered. The rates are shares of the number of
requests per second that `cascade-rt serve` answers at most. The others answer with the bundle's last member: FastAPI
around a pipeline of Optimum on ONNX Runtime, and LitServe with dynamic batching around the same. `2 workers` is our
server with two processes, and `regrouping off` where texts of different requests never run together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from common import RESULTS, run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.errors import InputError
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.plot import pyplot

OURS, WORKERS = "cascade-rt serve", "2 workers"
APART, FASTAPI, LITSERVE = "regrouping off", "FastAPI + Optimum", "LitServe + Optimum"
SERVERS = (OURS, WORKERS, APART, FASTAPI, LITSERVE)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
TIMEOUT = 10.0  # seconds; a request that takes longer counts as not answered
CONNECTIONS = 4000
HERE = Path(__file__).parent


class Running(NamedTuple):
    """A server that answers."""

    url: str
    pid: int


def main() -> None:
    """Measure all servers, print and write the report."""
    options = _parser().parse_args()
    texts = [str(row.text) for row in read_examples(options.data, pair=False)]
    report: dict[str, Any] = {"machine": describe(), "bundle": _bundle(options.model_dir), "texts": len(texts)}
    with running(OURS, options) as server:
        report["capacity"] = capacity = asyncio.run(capacity_of(server.url, texts, options.seconds))
    print(f"capacity of {OURS}: {capacity:.0f} requests per second", flush=True)
    report["one_client"] = _added(options, texts)
    print(f"one client, ms added to predict: {report['one_client']}", flush=True)
    report["servers"] = {}
    for name in options.servers:
        rows: list[dict[str, Any]] = []
        report["servers"][name] = rows
        with running(name, options) as server:
            for share in sorted(options.shares):
                if rows:
                    asyncio.run(ready(server.url))  # what still waits is answered before the next rate
                row = asyncio.run(offered(server.url, texts, share * capacity, options.seconds))
                rows.append({"share": share} | row)
                print(f"{name:20} {_line(rows[-1])}", flush=True)
                write_json(options.output, report)
    draw(report["servers"], options.output.with_suffix(".svg"))
    print(f"written: {options.output}")


def _line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{row[key]:8.1f}" if row[key] is not None else "       -" for key in ("p50", "p95", "p99"))
    return (
        f"{100 * row['share']:4.0f}%  offered {row['offered']:6.1f}/s  answered {row['answered']:6.1f}/s  "
        f"p50 p95 p99, ms: {times}  refused {row['refused']}  failed {row['failed']}"
    )


def _bundle(folder: Path) -> dict[str, Any]:
    runtime = CascadeRuntime(folder)
    return {
        "members": [f"{member.name} ({member.layers}L {member.precision})" for member in runtime.bundle.members],
        "thresholds": runtime.thresholds,
    }


@contextmanager
def running(name: str, options: argparse.Namespace) -> Iterator[Running]:
    """Start a server, wait until it answers, and yield it; it is killed afterwards."""
    url = f"http://127.0.0.1:{options.port}"
    ours = ["--model-dir", str(options.model_dir), "--max-queue", str(options.max_queue)]
    theirs = ["--member", str(options.member)]
    serve = ["-m", "cascade_rt", "serve", *ours, "--max-wait-ms", str(options.max_wait_ms)]
    arguments = {
        OURS: serve,
        WORKERS: [*serve, "--workers", "2"],
        APART: [str(HERE / "other_servers.py"), "apart", *ours],
        FASTAPI: [str(HERE / "other_servers.py"), "fastapi", *theirs],
        LITSERVE: [str(HERE / "litserve_server.py"), *theirs],
    }[name]
    with started([sys.executable, *arguments, "--port", str(options.port)], url) as process:
        yield Running(url, process.pid)


@contextmanager
def started(command: Sequence[str], url: str, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server's process, wait until it answers, and yield it; it is killed afterwards. `settings`: of Popen."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True, **settings) as process:
        try:
            asyncio.run(ready(url, process))
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its workers


async def ready(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + 120
    async with session() as http:
        while (await ask(http, url, "a text"))[0] != 200:
            if time.monotonic() > until or (process is not None and process.poll() is not None):
                raise InputError("a server does not answer; install its packages: pip install '.[bench]'")
            await asyncio.sleep(0.2)


async def ask(http: aiohttp.ClientSession, url: str, text: str) -> tuple[int, float]:
    """Return the status of a request, 0 where none came, and its seconds."""
    started = time.perf_counter()
    try:
        async with http.post(f"{url}/predict", json={"inputs": text}) as response:
            await response.read()
            return response.status, time.perf_counter() - started
    except (aiohttp.ClientError, asyncio.TimeoutError):
        return 0, time.perf_counter() - started


def session() -> aiohttp.ClientSession:
    """Return a client with many connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=aiohttp.ClientTimeout(total=TIMEOUT)
    )


async def capacity_of(url: str, texts: Sequence[str], seconds: float) -> float:
    """Return how many requests per second are answered when 64 are always under way."""
    async with session() as http:
        done = 0
        until = time.perf_counter() + seconds

        async def client(draw: random.Random) -> None:
            nonlocal done
            while time.perf_counter() < until:
                status, _ = await ask(http, url, draw.choice(texts))
                done += status == 200

        await asyncio.gather(*(client(random.Random(seed)) for seed in range(64)))
    return done / seconds


async def offered(url: str, texts: Sequence[str], rate: float, seconds: float) -> dict[str, Any]:
    """Send requests at random moments for so many seconds, after 2 seconds of warm-up; return what became of them."""
    draw = random.Random(0)
    warm, started = 2.0, time.perf_counter()
    tasks: list[tuple[float, asyncio.Task[tuple[int, float]]]] = []
    async with session() as http:
        at = 0.0
        while (at := at + draw.expovariate(rate)) < warm + seconds:
            pause = started + at - time.perf_counter()
            if pause > 0 or len(tasks) % 50 == 0:
                await asyncio.sleep(max(0.0, pause))
            tasks.append((at, asyncio.create_task(ask(http, url, draw.choice(texts)))))
        found = [(at, *await task) for at, task in tasks]
    measured = [(status, took) for at, status, took in found if at >= warm]
    times = [1000 * took for status, took in measured if status == 200]
    percentiles = np.percentile(times, [50, 95, 99]).tolist() if times else [None] * 3
    # Answers that came within the measured seconds: a queue that is emptied afterwards counts for nothing.
    in_time = sum(status == 200 and warm <= at + took < warm + seconds for at, status, took in found)
    return {
        "offered": len(measured) / seconds,
        "answered": in_time / seconds,
        "p50": percentiles[0],
        "p95": percentiles[1],
        "p99": percentiles[2],
        "refused": sum(status == 503 for status, _ in measured),
        "failed": sum(status not in (200, 503) for status, _ in measured),
    }


def _added(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, float]:
    """Return the milliseconds that a request takes longer than `predict`, for one client: texts in blocks, in turn."""
    runtime = CascadeRuntime(options.model_dir, preload=True)

    async def rounds(url: str) -> list[tuple[float, float]]:
        rows = []
        async with session() as http:
            for some in [texts[start : start + 50] for start in range(0, 400, 50)]:
                direct = []
                for text in some:
                    started = time.perf_counter()
                    runtime.predict([text])
                    direct.append(time.perf_counter() - started)
                await asyncio.sleep(0.05)
                served = [(await ask(http, url, text))[1] for text in some]
                rows.append((float(np.median(direct)), float(np.median(served))))
        return rows[1:]

    with running(OURS, options) as server:
        found = 1000 * np.array(asyncio.run(rounds(server.url)))
    added = found[:, 1] - found[:, 0]
    return {
        "predict_ms": float(np.median(found[:, 0])),
        "request_ms": float(np.median(found[:, 1])),
        "added_ms": float(np.median(added)),
        "added_ms_low": float(added.min()),
        "added_ms_high": float(added.max()),
    }


def draw(servers: dict[str, Any], path: Path) -> None:
    """Draw p99 and answers per second over offered load."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("p99", "answered"), ("p99, ms", "answers per second"), strict=True):
        for name, rows in servers.items():
            axis.plot([row["offered"] for row in rows], [row[key] for row in rows], ".-", label=name)
        axis.set(xlabel="requests per second offered", ylabel=label)
    axes[0].set_yscale("log")
    axes[1].legend()
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, metavar="BUNDLE")
    add("--member", type=Path, required=True, metavar="DIR", help="the bundle's last member, as `train` wrote it")
    add("--data", type=Path, required=True, metavar="FILE", help="texts")
    add("--seconds", type=float, default=8, help="for each rate")
    add("--shares", type=float, nargs="*", default=SHARES, help="of the capacity")
    add("--servers", nargs="*", default=SERVERS, choices=SERVERS)
    add("--max-wait-ms", type=float, default=0.0)
    add("--max-queue", type=int, default=100, help="of our servers")
    add("--port", type=int, default=8642)
    add("--output", type=Path, default=RESULTS / "serving.json")
    return parser


if __name__ == "__main__":
    run_command(main)
