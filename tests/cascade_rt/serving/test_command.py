"""`cascade-rt serve` as a process: signals, logs, and what it refuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from cascade_rt.cli import main


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    # A shell in the background, or nohup, has its children ignore signals.
    heed = "import signal, cascade_rt.cli; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    command = [sys.executable, "-c", f"{heed}raise SystemExit(cascade_rt.cli.main())"]
    command += ["serve", "--port", str(port), "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 600  # on a busy machine, a Ray cluster takes minutes
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < until
            time.sleep(0.05)
        try:
            yield process, address
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_open_requests_finish(bundle: Path, number: int) -> None:
    with serving("--model-dir", str(bundle)) as (process, address):
        statuses: list[int] = []

        def ask() -> None:
            with httpx.stream(
                "POST",
                f"{address}/v1/classify",
                json={"texts": ["the film was good"] * 900},
                headers={"Accept": "application/x-ndjson"},
                timeout=30,
            ) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(number)
                statuses.append(len(list(lines)))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert statuses == [899]
        assert process.wait(timeout=20) == 0
        errors = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in errors
    row = json.loads(errors.splitlines()[-1])
    assert (row["message"], row["path"], row["status"]) == ("request", "/v1/classify", 200)
    assert "good" not in errors


def test_a_token_file_and_a_second_bundle(bundle: Path, pair_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    options = ["--token-file", str(tmp_path / "token"), "--model", f"pairs={pair_bundle}", "--root-path", "/toys/"]
    with serving("--model-dir", str(bundle), *options) as (_, address):
        body = {"model": "pairs", "texts": [["a", "b"]]}
        assert httpx.post(f"{address}/v1/classify", json=body).status_code == 401
        answer = httpx.post(f"{address}/toys/v1/classify", json=body, headers={"Authorization": "Bearer secret"})
        assert answer.json()["model"] == "pairs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --model-dir, --model or both"),
        (["--model", "toy"], "found --model toy, expected NAME=DIR, each name once"),
        (["--model", "a/b=bundle"], "expected NAME=DIR"),
        (["--model", "a=bundle", "--model", "a=bundle"], "each name once"),
        (["--model-dir", "nothing"], "no bundle there"),
        (["--model-dir", "BUNDLE", "--token-file", "empty"], "found no usable token"),
        (["--model-dir", "BUNDLE", "--token-file", "nothing"], "nothing"),
        (["--model-dir", "BUNDLE", "--max-queue", "0"], "--max-queue: found 0, expected at least 1"),
        (["--model-dir", "BUNDLE", "--max-wait-ms", "-1"], "--max-wait-ms: found -1"),
        (["--model-dir", "BUNDLE", "--provider-option", "device_id"], "expected KEY=VALUE"),
        (
            ["--model-dir", "BUNDLE", "--root-path", "toys"],
            "--root-path: found 'toys', expected a path such as /sentiment",
        ),
        (["--model-dir", "BUNDLE", "--root-path", "/v2"], "--root-path: found '/v2', expected another one than /v2"),
        (["--model-dir", "BUNDLE", "--port", "99999"], "--port: found 99999, expected a number from 0 to 65535"),
        (["--model-dir", "BUNDLE", "--grpc-port", "-1"], "--grpc-port: found -1, expected a number from 0 to 65535"),
    ],
)
def test_what_cannot_be_served(
    options: list[str],
    message: str,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setattr("uvicorn.Server.run", lambda *args, **kwargs: pytest.fail("it serves"))
    assert main(["serve", *(str(bundle) if option == "BUNDLE" else option for option in options)]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--model-dir", str(bundle), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capfd.readouterr().err
