"""Instructions of fixed calls, counted by valgrind and compared with a baseline, so that a slow-down shows.

python benchmarks/guard.py            compare with benchmarks/results/guard.json
python benchmarks/guard.py --write    replace the baseline

Instructions do not depend on what else the machine does, and valgrind shows programs the same CPU features wherever it
runs, so a difference of a few percent is a change of the code or of a library. They are not times: cache misses and
mispredicted branches do not show. The bundle is `examples/smart-home`, with one thread.
"""

from __future__ import annotations

import argparse
import csv
import gc
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "benchmarks" / "results" / "guard.json"
TOLERANCE = 0.03
_FEW, _MORE = 10, 40  # repetitions, whose difference leaves out what is done once
_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "uvicorn", "fastapi")


def main() -> int:
    """Count, compare, print; return 1 for more instructions than the baseline has."""
    options = _parser().parse_args()
    if options.child:
        _child(options.child)
        return 0
    if shutil.which("valgrind") is None:
        print("found no valgrind; it is a package of most distributions", file=sys.stderr)
        return 2
    counted = _counted()
    found = {"versions": _versions(), "instructions": counted}
    if options.write:
        BASELINE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"written: {BASELINE}")
        return 0
    baseline = json.loads(BASELINE.read_text("utf-8"))
    if baseline["versions"] != found["versions"]:
        print(f"the baseline is of {baseline['versions']}, this is {found['versions']}")
    slower = False
    for name, count in counted.items():
        change = count / baseline["instructions"][name] - 1
        slower |= change > TOLERANCE
        print(f"{name:12} {count:>12,} instructions, {100 * change:+.1f}%{'  SLOWER' if change > TOLERANCE else ''}")
    return int(slower)


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}}


def _counted() -> dict[str, int]:
    """Return the instructions of each call, of one repetition."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--quiet"]
        environment = os.environ | {"PYTHONHASHSEED": "0", "ORT_DISABLE_TELEMETRY": "1", "CASCADE_RT_CACHE": "off"}
        subprocess.run([*command, sys.executable, __file__, "--child", folder], env=environment, check=True)
        calls = json.loads((Path(folder) / "calls.json").read_text("utf-8"))
        totals = [_total(Path(f"{out}.{number}")) for number in range(1, 2 * len(calls) + 1)]
    pairs = zip(calls, totals[::2], totals[1::2], strict=True)
    return {name: round((more - few) / (_MORE - _FEW)) for name, few, more in pairs}


def _total(file: Path) -> int:
    """Return the sum of all threads in a dump of callgrind."""
    return sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("totals:"))


def _child(folder: str) -> None:
    """Make the calls, with a dump of the counts after each; this is what valgrind runs."""
    calls = _calls()
    gc.collect()
    gc.disable()
    for call in calls.values():
        call()
        call()
    _control("-i", "on")
    for call in calls.values():
        for repetitions in (_FEW, _MORE):
            _control("-z")
            for _ in range(repetitions):
                call()
            _control("-d")
    (Path(folder) / "calls.json").write_text(json.dumps(list(calls)), encoding="utf-8")
    os._exit(0)


def _control(*options: str) -> None:
    command = ["callgrind_control", *options, str(os.getpid())]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def _calls() -> dict[str, Callable[[], Any]]:
    from cascade_rt import CascadeRuntime  # noqa: PLC0415 - the parent process needs none of it
    from cascade_rt.engine.execution import Execution  # noqa: PLC0415

    bundle = str(ROOT / "examples" / "smart-home")
    with (ROOT / "examples" / "commands.csv").open(encoding="utf-8", newline="") as stream:
        texts = [row[0] for row in csv.reader(stream)][1:]
    runtime = CascadeRuntime(bundle, threads=1, preload=True)
    leaves = next(text for text, answer in zip(texts, runtime.predict(texts), strict=True) if not answer.exit)
    many = list(islice(cycle(texts), 256))
    connection, body = http.client.HTTPConnection(_served(bundle, Execution(threads=1))), json.dumps({"inputs": leaves})

    def request() -> None:
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        connection.getresponse().read()

    return {
        "tokens of 32": lambda: [runtime.plan.encode([text]) for text in islice(cycle(texts), 32)],
        "one text": lambda: runtime.predict([leaves]),
        "256 texts": lambda: runtime.predict(many),
        "request": request,
    }


def _served(bundle: str, execution: Any) -> str:
    """Serve in a thread; return host and port."""
    from cascade_rt.serving.app import create_app  # noqa: PLC0415
    from cascade_rt.serving.server import Server, configured  # noqa: PLC0415
    from cascade_rt.serving.service import Service  # noqa: PLC0415
    from cascade_rt.serving.settings import Settings  # noqa: PLC0415

    service = Service({"smart-home": bundle}, Settings(execution=execution, reload_seconds=0))
    server = Server(configured(create_app(service), port=0), service)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    return f"{host}:{port}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the baseline")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
