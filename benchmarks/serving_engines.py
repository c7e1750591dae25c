"""The cost of Ray Serve: single texts to `cascade-rt serve`, on the local engine and on Ray, both on this machine.

    python benchmarks/serving_engines.py --model-dir BUNDLE --data DATA/sst2/dev.tsv

The servers run at the same time and take turns. A replica has one thread, and so has the local server; there is one
replica, behind Ray Serve's own proxy or behind HAProxy. Needs the extra ray, and Linux for HAProxy.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import httpx
import numpy as np
from common import RESULTS, run_command

from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.workload import spread
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.serving import Client

_RAY = ["--engine", "ray", "--address", "local", "--max-replicas", "1"]
ENGINES: dict[str, tuple[list[str], dict[str, str]]] = {
    "local": ([], {}),
    "ray": (_RAY, {}),
    "ray with HAProxy": (_RAY, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}),
}
"""Options and environment of each server."""


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    texts = [str(row.text) for row in read_examples(options.data, pair=False)]
    report: dict[str, Any] = {"machine": describe(), "bundle": str(options.model_dir), "engines": {}}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(_server(options, name)) for name in ENGINES}
        for url in urls.values():
            _ask(url, texts, 2, options.seconds)  # warm-up
        for clients in options.clients:
            found: dict[str, list[list[float]]] = {name: [] for name in urls}
            for _ in range(options.rounds):
                for name, url in urls.items():
                    found[name].append(_ask(url, texts, clients, options.seconds))
            for name, rounds in found.items():
                times = 1000 * np.concatenate(rounds)
                rate = spread(np.array([len(times) / options.seconds for times in rounds]))
                p50, p95 = np.percentile(times, [50, 95]).tolist()
                row = {"requests_per_second": rate, "p50_ms": p50, "p95_ms": p95}
                report["engines"].setdefault(name, {})[str(clients)] = row
                rates = f"{rate['median']:.0f} requests/s ({rate['min']:.0f}-{rate['max']:.0f})"
                print(f"{name:16} {clients} clients: {rates}, p50 {p50:.1f} ms, p95 {p95:.1f} ms", flush=True)
    write_json(options.output, report)


@contextmanager
def _server(options: argparse.Namespace, name: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "cascade_rt", "serve", "--model-dir", str(options.model_dir), "--port", port]
    more, environment = ENGINES[name]
    process = subprocess.Popen(
        [*command, "--threads", "1", *more],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _ready(url):
            if process.poll() is not None:
                raise SystemExit(f"the server on the engine {name} ended with status {process.returncode}")
            sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def _ask(url: str, texts: Sequence[str], clients: int, seconds: float) -> list[float]:
    """Let clients ask for single texts, one after the other; return the seconds of each request."""
    until = monotonic() + seconds

    def ask(seed: int) -> list[float]:
        draw, times = random.Random(seed), []
        with Client(url) as client:
            while monotonic() < until:
                started = perf_counter()
                client.classify([draw.choice(texts)])
                times.append(perf_counter() - started)
        return times

    with ThreadPoolExecutor(clients) as pool:
        return [time for times in pool.map(ask, range(clients)) for time in times]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--data", required=True, help="texts")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="that ask at the same time")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "serving-engines.json")
    return parser


if __name__ == "__main__":
    run_command(main)
