"""Servers under load: by wrk, an independent generator, at 1 and at 16 connections, in turn.

python benchmarks/load.py --model-dir BUNDLE --data FILE [--member DIR] [--tree before=CHECKOUT] [--output FILE]

Servers are loaded one at a time while the others are idle: ours, with `--workers 2` too; `plain`, the bundle's first
member alone behind uvicorn and one route; and with `--member`, the biggest one behind FastAPI + Optimum and LitServe.
A server has one core (two workers both) and wrk another where there are two. Texts are those of `--data`, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import RESULTS, named_folders, run_command
from serving import started

from cascade_rt import InputError
from cascade_rt.benchmark.machine import describe
from cascade_rt.engine.cpus import usable_cpus
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.io.writers import write_json

HERE = Path(__file__).parent
CONNECTIONS = (1, 16)
_SECONDS, _ROUNDS, _PORT = 4, 5, 9300
_SCRIPT = """
local bodies, at = {}, 0
for line in io.lines("BODIES") do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  at = at % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"seconds": %f, "requests": %d, "errors": %d, "p50": %f, "p95": %f, "p99": %f}',
    summary.duration / 1e6, summary.requests, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
"""


def main() -> None:
    """Start the servers, load them in turn, print medians, write the JSON."""
    options = _parser().parse_args()
    options.model_dir = str(Path(options.model_dir).resolve())  # servers have their own working directory
    options.member = options.member and str(Path(options.member).resolve())
    if shutil.which("wrk") is None:
        raise InputError("found no wrk; it is a package of most distributions")
    reading = Reading(label_column=options.label_column)
    texts = [str(example.text) for example in read_examples(options.data, pair=False, reading=reading)]
    trees = {"cascade-rt": HERE.parent, **{name: Path(folder) for name, folder in named_folders("tree", options.tree)}}
    ours, others = ["-m", "cascade_rt", "serve", "--threads", "1", "--model-dir"], str(HERE / "other_servers.py")
    servers = {name: ([*ours, options.model_dir], tree) for name, tree in trees.items()}
    servers["cascade-rt, 2 workers"] = [*ours, options.model_dir, "--workers", "2"], HERE.parent
    servers["plain"] = [others, "plain", "--model-dir", options.model_dir], HERE.parent
    if options.member:
        servers["FastAPI + Optimum"] = [others, "fastapi", "--member", options.member], HERE.parent
        servers["LitServe"] = [str(HERE / "litserve_server.py"), "--member", options.member], HERE.parent
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {connections: [] for connections in CONNECTIONS} for name in servers
    }
    with ExitStack() as stack, TemporaryDirectory() as folder:
        bodies, script = Path(folder) / "bodies", Path(folder) / "load.lua"
        bodies.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in texts[: options.texts]), "utf-8")
        script.write_text(_SCRIPT.replace("BODIES", str(bodies)))
        ports = {name: _PORT + at for at, name in enumerate(servers)}
        for name, (command, tree) in servers.items():
            stack.enter_context(_started(command, ports[name], tree))
        for _ in range(_ROUNDS):
            for connections in CONNECTIONS:
                for name in servers:
                    found[name][connections].append(_loaded(ports[name], script, connections))
    report = {
        "machine": describe(),
        "bundle": Path(options.model_dir).name,
        "texts": min(len(texts), options.texts),
        "seconds": _SECONDS,
        "servers": found,
    }
    output: Path = options.output or RESULTS / "load.json"
    write_json(output, report)
    for name, rounds in found.items():
        for connections, runs in rounds.items():
            median = {key: float(np.median([run[key] for run in runs])) for key in ("p50", "p95", "p99")}
            rates = sorted(run["requests"] / run["seconds"] for run in runs)
            errors = int(sum(run["errors"] for run in runs))
            print(
                f"{name:22} {connections:3} connections: p50 {median['p50']:7.2f}, p95 {median['p95']:7.2f}, p99 "
                f"{median['p99']:7.2f} ms, {np.median(rates):7.0f} requests/s ({rates[0]:.0f} to {rates[-1]:.0f})"
                + (f", {errors} errors" if errors else "")
            )
    print(f"written: {output}")


def _started(command: Sequence[str], port: int, tree: Path) -> AbstractContextManager[object]:
    """Return a server that runs to the end of the block; `tree`: the checkout that it runs from."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "export", HERE))),
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    cores = [] if "--workers" in command else _pinned(1)
    whole = [*cores, sys.executable, *command, "--port", str(port)]
    return started(whole, f"http://127.0.0.1:{port}", env=environment, cwd=tree)


def _loaded(port: int, script: Path, connections: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}/predict"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{_SECONDS}s", "-s", str(script), url]
    done = subprocess.run([*_pinned(0), *command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout[done.stdout.rindex("{") :])
    return found


def _pinned(core: int) -> list[str]:
    """Return how to run on one core, where there are two."""
    return ["taskset", "-c", str(core)] if usable_cpus() > 1 and shutil.which("taskset") else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--model-dir", required=True, metavar="BUNDLE")
    add("--data", type=Path, required=True, metavar="FILE", help="texts")
    add("--label-column", help="its column of labels")
    add("--texts", type=int, default=1000, help="so many of them (default: 1000)")
    add("--member", metavar="DIR", help="the biggest member as torch weights, for servers of other libraries")
    add("--tree", action="append", default=[], metavar="NAME=DIR", help="another checkout of cascade-rt; repeat")
    add("--output", type=Path, metavar="FILE", help="the report (default: benchmarks/results/load.json)")
    return parser


if __name__ == "__main__":
    run_command(main)
