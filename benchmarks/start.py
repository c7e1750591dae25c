"""Memory and start of a bundle: a new process opens it and answers one text, or many; the kernel says its memory.

python benchmarks/start.py --model-dir bundle/
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, run_command

from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import read_bundle
from cascade_rt.engine.prepared import OFF
from cascade_rt.io.writers import write_json

CODE = """
import sys, time
began = time.perf_counter()
import json
import numpy, onnxruntime, tokenizers

def memory():
    rollup = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    found = {name: int(rollup[name].split()[0]) / 1024 for name in ("Rss", "Pss", "Anonymous")}
    return found | {"peak": int(peak.split()[1]) / 1024}

imports = memory()
from cascade_rt import CascadeRuntime
folder, cache, threshold, texts, waits = sys.argv[1:]
cache, unpacked, _ = cache.partition("+")
runtime = CascadeRuntime(folder, cache=cache, thresholds=float(threshold), threads=1, packed=not unpacked)
text = ("it is getting dark in here",) * 2 if runtime.bundle.pair else "it is getting dark in here"
exits = [answer.exit for answer in runtime.predict([text] * int(texts))]
seconds = time.perf_counter() - began
found = {"seconds": seconds, "exit": max(exits), "imports": imports, "memory": memory()}
if waits == "wait":
    print("ready", flush=True)
    sys.stdin.readline()
    found["memory"] = memory()
print(json.dumps(found), flush=True)
"""


def main() -> None:
    """Measure, write the JSON, print a table."""
    options = _parser().parse_args()
    bundle = read_bundle(options.model_dir)
    size = sum(
        file.stat().st_size for member in bundle.members for file in member.files(options.model_dir / member.file)
    )
    with tempfile.TemporaryDirectory(prefix="cascade-start-") as cache:
        _once(options.model_dir, cache, 1.0, 1)  # prepares all members
        rows = {
            f"{reached}, {texts} text{'s' * (texts > 1)}, {kept}": _summary(runs)
            for (reached, texts, kept), runs in _runs(options, cache).items()
        }
        report: dict[str, Any] = {
            "machine": describe(),
            "bundle": options.model_dir.resolve().name,
            "megabytes": size / 2**20,
            "prepared_megabytes": sum(file.stat().st_size for file in Path(cache).rglob("*.*")) / 2**20,
            "members": {member.name: member.precision for member in bundle.members},
            "runs": rows,
            "sharing": {kept: _shared(options.model_dir, place, 4) for kept, place in _places(cache).items()},
            "limits": {
                kept: {str(limit): _within(options.model_dir, place, limit) for limit in options.limits}
                for kept, place in _places(cache).items()
            },
        }
    output = options.output or RESULTS / f"start-{options.model_dir.resolve().name}.json"
    write_json(output, report)
    for name, row in rows.items():
        print(name, " ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(json.dumps({key: report[key] for key in ("megabytes", "prepared_megabytes", "sharing", "limits")}))


def _places(cache: str) -> dict[str, str]:
    """Return the cache of each kind of process; "+" for weights that are not packed."""
    return {"not prepared": OFF, "prepared": cache, "prepared, not packed": f"{cache}+"}


def _runs(options: argparse.Namespace, cache: str) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Return what each kind of process measured, the kinds in turn."""
    kinds = [(reached, texts) for reached in ("first member", "all members") for texts in options.texts]
    runs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for reached, texts in kinds:
            for kept, place in _places(cache).items():
                found = _once(options.model_dir, place, 1.0 if reached == "all members" else 0.0, texts)
                runs.setdefault((reached, texts, kept), []).append(found)
    return runs


def _command(folder: Path, cache: str, threshold: float, texts: int, *, waits: bool = False) -> list[str]:
    return [sys.executable, "-c", CODE, str(folder), cache, str(threshold), str(texts), "wait" if waits else "go"]


def _once(folder: Path, cache: str, threshold: float, texts: int) -> dict[str, Any]:
    done = subprocess.run(_command(folder, cache, threshold, texts), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return medians: seconds, and megabytes over those of the imports, but for the peak, which is of all."""

    def median(name: str) -> float:
        return float(statistics.median(run["memory"][name] for run in runs))

    anonymous = [run["memory"]["Anonymous"] - run["imports"]["Anonymous"] for run in runs]
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "fastest": min(run["seconds"] for run in runs),
        "anonymous_over_imports": statistics.median(anonymous),
        "pss": median("Pss"),
        "resident": median("Rss"),
        "peak": median("peak"),
        "peak_of_imports": statistics.median(run["imports"]["peak"] for run in runs),
    }


def _shared(folder: Path, cache: str, count: int) -> dict[str, float]:
    """Return the mean memory of several processes that have all members loaded at the same time."""
    command = _command(folder, cache, 1.0, 1, waits=True)
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    found = []
    for process in processes:  # each looks while the others are there
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found.append(json.loads(process.stdout.readline())["memory"])
    return {"processes": count, **{name: statistics.mean(one[name] for one in found) for name in ("Pss", "Rss")}}


def _within(folder: Path, cache: str, megabytes: int) -> str:
    """Say whether one text through all members is answered in a control group of so much memory, without swap."""
    group = Path(f"/sys/fs/cgroup/memory/cascade-start-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        return "no control group could be made here"
    try:
        (group / "memory.limit_in_bytes").write_text(str(megabytes * 2**20))
        (group / "memory.swappiness").write_text("0")
        join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", join, "sh", *_command(folder, cache, 1.0, 1)], capture_output=True, text=True, check=False
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
        if done.returncode == 0:
            return f"answered, {json.loads(done.stdout)['seconds']:.2f} s"
        return f"killed (exit status {done.returncode}) at {peak:.0f} MB"
    finally:
        group.rmdir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, metavar="BUNDLE")
    add("--rounds", type=int, default=7, help="processes of each kind; default: 7")
    add("--texts", type=int, nargs="+", default=[1, 500], help="texts that a process answers; default: 1 500")
    add("--limits", type=int, nargs="*", default=[256, 128, 80], metavar="MB", help="control groups to try")
    add("--output", type=Path, help="default: results/start-BUNDLE.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
