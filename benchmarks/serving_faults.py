"""`cascade-rt serve` under overload, clients that misbehave, a kill, and bundles that are replaced.

    python benchmarks/serving_faults.py --model-dir BUNDLE --data DATA/sst2/dev.tsv

Each part starts a server of its own. The script fails where a promise of the guide is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, run_command
from serving import OURS, Running, ask, capacity_of, offered, ready, running, session

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import write_bundle, write_manifest
from cascade_rt.errors import CascadeError
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json

CLIENTS = 1000
SLOW = 200
REPLACEMENTS = 100
MOST_GROWTH = 1.05  # of memory, from the first quarter to the last


def main() -> None:
    """Run all parts, print and write the report."""
    options = _parser().parse_args()
    texts = [str(row.text) for row in read_examples(options.data, pair=False)]
    report: dict[str, Any] = {"machine": describe()}
    for name, part in (
        ("overload", _overload),
        ("hang_ups", _hang_ups),
        ("slow_clients", _slow_clients),
        ("kill", _kill),
        ("replacements", _replacements),
    ):
        if name in options.parts:
            report[name] = part(options, texts)
            print(f"{name}: {report[name]}", flush=True)
            write_json(options.output, report)
    print(f"written: {options.output}")


def _check(holds: bool, promise: str) -> None:
    if not holds:
        raise CascadeError(f"not kept: {promise}")


def _memory_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _overload(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Three times the capacity: every request is answered or refused, and memory does not grow."""
    with running(OURS, options) as server:
        capacity = asyncio.run(capacity_of(server.url, texts, 5))
        memory: list[float] = []

        async def measured() -> dict[str, Any]:
            async def sample() -> None:
                while True:
                    await asyncio.sleep(1)
                    memory.append(_memory_mb(server.pid))

            sampling = asyncio.create_task(sample())
            found = await offered(server.url, texts, 3 * capacity, options.seconds)
            sampling.cancel()
            return found

        found = asyncio.run(measured())
    quarter = max(1, len(memory) // 4)
    first, last = float(np.median(memory[:quarter])), float(np.median(memory[-quarter:]))
    _check(found["failed"] == 0, "every request is answered or gets 503")
    _check(last <= MOST_GROWTH * first, f"memory grows by at most 5%: {first:.0f} MB, then {last:.0f} MB")
    return {"capacity": capacity, "memory_mb": [first, last]} | found


def _hang_ups(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Clients that hang up in the middle of their request: the queues are empty soon, and others are answered."""
    with running(OURS, options) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = b'{"inputs": "%s"}' % (b"long " * 60)
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        whole = head % len(body) + body
        draw = random.Random(0)
        for _ in range(CLIENTS):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(whole[: draw.randint(1, len(whole))])
        started = time.monotonic()
        asyncio.run(ready(server.url))
        waited = time.monotonic() - started
        waiting = asyncio.run(_queued(server))
        _check(waiting == 0, "the texts of clients that hung up leave the queues")
    return {"clients": CLIENTS, "seconds_until_an_answer": waited, "waiting": waiting}


async def _queued(server: Running) -> int:
    async with session() as http, http.get(f"{server.url}/v1/models") as response:
        return sum(sum(model["queued"]) for model in (await response.json())["models"])


def _slow_clients(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Headers and bodies that never end, a byte a second: others are answered as before, the connections are closed."""
    with running(OURS, options) as server:
        host, port = server.url.removeprefix("http://").split(":")
        start = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
        starts = {"headers": start + b"X-Slow: ", "bodies": start + b"Content-Length: 1000\r\n\r\n"}
        slow = {
            kind: [socket.create_connection((host, int(port))) for _ in range(SLOW // len(starts))] for kind in starts
        }
        everyone = [connection for some in slow.values() for connection in some]
        for kind, some in slow.items():
            for connection in some:
                connection.sendall(starts[kind])

        def trickle(until: float) -> None:
            while time.monotonic() < until:
                for connection in everyone:
                    with suppress(OSError):  # closed, as it should be
                        connection.sendall(b"a")
                time.sleep(1)

        with ThreadPoolExecutor() as pool:
            trickling = pool.submit(trickle, time.monotonic() + 85)
            found = asyncio.run(offered(server.url, texts, 20, 10))
            trickling.result()
        _check(found["failed"] == 0, "others are answered")
        closed = {kind: sum(map(_closed, some)) for kind, some in slow.items()}
        _check(sum(closed.values()) == SLOW, f"all slow connections are closed after 70 s: {closed} of {SLOW}")
    return {"connections": SLOW, "closed": closed, "others": found}


def _closed(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def _kill(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """SIGKILL under load, and a new process: only requests under way at that moment fail."""
    command = [sys.executable, "-m", "cascade_rt", "serve", "--model-dir", str(options.model_dir)]
    command += ["--port", str(options.port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    async def under_load() -> dict[str, Any]:
        url = f"http://127.0.0.1:{options.port}"
        statuses: Counter[str] = Counter()
        under_way = 0
        up = asyncio.Event()

        async def client(draw: random.Random) -> None:
            nonlocal under_way
            while True:
                await up.wait()
                under_way += 1
                try:
                    status, _ = await ask(http, url, draw.choice(texts))
                finally:
                    under_way -= 1
                statuses[str(status)] += 1

        async with session() as http:
            process = subprocess.Popen(command, **quiet)
            await ready(url)
            up.set()
            clients = [asyncio.create_task(client(random.Random(seed))) for seed in range(32)]
            await asyncio.sleep(5)
            up.clear()
            lost = under_way
            process.kill()
            process.wait()
            await asyncio.sleep(0.5)
            process = subprocess.Popen(command, **quiet)
            started = time.monotonic()
            await ready(url)
            restarted = time.monotonic() - started
            up.set()
            await asyncio.sleep(5)
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            process.kill()
            process.wait()
        _check(statuses["0"] <= lost, "only what was under way is lost")
        return {"answered": statuses["200"], "under_way": lost, "lost": statuses["0"], "restart_seconds": restarted}

    return asyncio.run(under_load())


def _replacements(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """A bundle that is replaced under load: every answer is that of the bundle whose version it names."""
    some = list(texts[:100])
    with tempfile.TemporaryDirectory(prefix="cascade-faults-") as name:
        folder = Path(name)
        sources = [shutil.copytree(options.model_dir, folder / "one"), folder / "other"]
        with write_bundle(sources[1]) as fresh:
            shutil.copytree(sources[0], fresh, dirs_exist_ok=True)
            bundle = read_bundle(fresh)
            members = [replace(member, threshold=0.55) for member in bundle.members[:-1]]
            write_manifest(fresh, replace(bundle, members=(*members, bundle.members[-1]), other={}))
        expected = {}
        for source in sources:
            with CascadeRuntime(source) as runtime:
                version = (runtime.bundle.sha256 or "")[:12]
                expected[version] = [(found.label, found.exit) for found in runtime.predict(some)]
        served = shutil.copytree(sources[0], folder / "served")
        options = argparse.Namespace(**vars(options) | {"model_dir": served})
        with running(OURS, options) as server:
            return asyncio.run(_replace_under_load(server, served, sources, some, expected))


async def _replace_under_load(
    server: Running,
    served: Path,
    sources: Sequence[Path],
    texts: Sequence[str],
    expected: dict[str, list[tuple[str, int]]],
) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    wrong = 0

    async def client(draw: random.Random) -> None:
        nonlocal wrong
        while True:
            row = draw.randrange(len(texts))
            async with http.post(f"{server.url}/v1/classify", json={"texts": [texts[row]]}) as response:
                body = await response.json()
            if response.status != 200:
                seen[f"status {response.status}"] += 1
                continue
            (found,) = body["predictions"]
            wrong += (found["label"], found["exit"]) != expected[body["version"]][row]
            seen[body["version"]] += 1

    def exchange(number: int) -> str:
        source = sources[(number + 1) % 2]
        with write_bundle(served, overwrite=True) as fresh:
            shutil.copytree(source, fresh, dirs_exist_ok=True)
        return list(expected)[(number + 1) % 2]

    async with session() as http:
        clients = [asyncio.create_task(client(random.Random(seed))) for seed in range(8)]
        for number in range(REPLACEMENTS):
            version = await asyncio.to_thread(exchange, number)
            while True:
                async with http.get(f"{server.url}/health") as response:
                    if next(iter((await response.json())["models"].values()))["version"] == version:
                        break
                await asyncio.sleep(0.05)
        for task in clients:
            task.cancel()
        failures = [found for found in await asyncio.gather(*clients, return_exceptions=True) if found is not None]
    _check(all(isinstance(found, asyncio.CancelledError) for found in failures), f"no request fails: {failures[:1]}")
    _check(wrong == 0, "every answer is that of the bundle it names")
    _check(set(seen) == set(expected), f"no request is refused: {dict(seen)}")
    return {"replacements": REPLACEMENTS, "answers": sum(seen.values()), "wrong": wrong}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    parts = ["overload", "hang_ups", "slow_clients", "kill", "replacements"]
    add("--model-dir", type=Path, required=True, metavar="BUNDLE")
    add("--data", type=Path, required=True, metavar="FILE", help="texts")
    add("--seconds", type=float, default=120, help="of overload")
    add("--max-wait-ms", type=float, default=0.0)
    add("--max-queue", type=int, default=100)
    add("--port", type=int, default=8643)
    add("--parts", nargs="*", default=parts, choices=parts)
    add("--output", type=Path, default=RESULTS / "serving-faults.json")
    parser.set_defaults(member=None)  # of the other servers
    return parser


if __name__ == "__main__":
    run_command(main)
