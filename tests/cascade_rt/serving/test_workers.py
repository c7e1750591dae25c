"""`cascade-rt serve --workers 2`: processes that share a port, are replaced when they die, and count together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.engine.cpus import usable_cpus

from ...toy import WORDS
from .test_command import free_port, serving

TEXTS = [" ".join(WORDS[at : at + 6]) for at in range(20)]
pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or usable_cpus() < 2, reason="needs Linux and two CPUs"
)


@pytest.fixture
def running(bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    options = ["--workers", "2", "--reload-seconds", "0.2", "--log-texts", "--root-path", "/toys"]
    with serving("--model-dir", str(folder), *options) as (process, address):
        eventually("two that serve", lambda: served_by_both(address))  # before, a worker that dies ends the server
        yield process, address


def eventually(what: str, holds: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def is_live(client: Any) -> bool:
    """True if a server answers gRPC, which starts after HTTP."""
    from tritonclient.utils import InferenceServerException

    with suppress(InferenceServerException):
        return bool(client.is_server_live())
    return False


def workers_of(pid: int) -> list[int]:
    """The processes that a server started, but for multiprocessing's own."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def allowed_cpus(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().partition("Cpus_allowed_list:")[2].split()[0]


def counted(address: str) -> int:
    text = httpx.get(f"{address}/metrics").text
    return int(sum(float(found) for found in re.findall(r"^cascade_texts_total\{.*\} (\S+)", text, re.MULTILINE)))


def served_by_both(address: str) -> bool:
    return re.search(r"^cascade_model\{.*\} 2\.0$", httpx.get(f"{address}/metrics").text, re.MULTILINE) is not None


def test_workers_answer_and_count_as_one_process_does(running: tuple[subprocess.Popen[str], str], bundle: Path) -> None:
    process, address = running
    with CascadeRuntime(bundle, threads=1) as runtime:
        expected = [(found.label, found.exit) for found in runtime.predict(TEXTS)]
    found = [
        httpx.post(f"{address}/toys/v1/classify", json={"texts": [text]}).json()["predictions"][0] for text in TEXTS
    ]
    assert [(row["label"], row["exit"]) for row in found] == expected
    (model,) = httpx.get(f"{address}/v1/models").json()["models"]
    assert model["texts"] == counted(address) == len(TEXTS)
    assert model["exits"] == [sum(exit == member for _, exit in expected) for member in range(3)]
    one, other = (allowed_cpus(pid) for pid in workers_of(process.pid))
    assert one != other

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert process.stderr is not None
    rows = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
    logged = [row for row in rows if row["message"] == "answers"]
    assert [row["texts"] for row in logged] == [[text] for text in TEXTS]
    assert [(row["labels"][0], row["exits"][0]) for row in logged] == expected
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_worker_that_dies_is_replaced_and_all_end_with_their_supervisor(
    running: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = running
    httpx.post(f"{address}/v1/classify", json={"texts": TEXTS}).raise_for_status()
    before = workers_of(process.pid)
    os.kill(before[0], signal.SIGKILL)
    eventually("a new worker", lambda: len(set(workers_of(process.pid)) - set(before)) == 1)

    eventually("two that serve", lambda: served_by_both(address))
    assert counted(address) == len(TEXTS), "what the dead one answered still counts"

    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    eventually("all workers end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_workers_share_a_grpc_port(bundle: Path) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    port = free_port()
    with serving("--model-dir", str(bundle), "--workers", "2", "--grpc-port", str(port)) as (_, address):
        eventually("two that serve", lambda: served_by_both(address))
        text = triton.InferInput("text", (1,), "BYTES")
        text.set_data_from_numpy(np.array([TEXTS[0].encode()], dtype=object))
        for _ in range(8):  # each connection goes to either
            with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                eventually("gRPC", lambda client=client: is_live(client))  # type: ignore[misc]
                assert client.infer("default", [text]).as_numpy("label").shape == (1,)
        assert counted(address) == 8


def test_workers_that_cannot_start(bundle: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")

    def refused(folder: Path, workers: str) -> str:
        command = [sys.executable, "-m", "cascade_rt", "serve", "--port", "0", "--model-dir", str(folder)]
        found = subprocess.run(
            [*command, "--workers", workers], check=False, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 2
        assert "Traceback" not in found.stderr
        return found.stderr

    assert "--workers: found 1000, expected a whole number from 1 to" in refused(bundle, "1000")
    assert "tokenizer.json" in refused(damaged, "2")
