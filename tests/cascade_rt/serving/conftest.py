"""For the server's tests: services on toy bundles, in this process and behind a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import RunOutput, Stage
from cascade_rt.serving.app import create_app
from cascade_rt.serving.server import Server, configured
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings


class Gate:
    """Holds every run of a stage back while it is closed, and remembers the runs."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()
        self.entered = threading.Semaphore(0)
        self.held: set[str] = set()
        self.released = threading.Event()
        self.runs: list[tuple[str, int]] = []
        """Member and number of texts of each run, in order."""

    def close(self) -> None:
        """Hold runs back from now on; those before are forgotten."""
        self.runs.clear()
        self.entered = threading.Semaphore(0)
        self.opened.clear()

    def hold(self, member: str) -> None:
        """Let runs go on, but for those of a member, from now on."""
        self.held.add(member)
        self.opened.set()

    def wait_for_run(self) -> None:
        assert self.entered.acquire(timeout=10)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found, run = Gate(), Stage.run

    def gated(stage: Stage, batch: Any) -> RunOutput:
        found.runs.append((stage.entry.name, len(batch["attention_mask"])))
        found.entered.release()
        assert found.opened.wait(timeout=10)
        if stage.entry.name in found.held:
            found.released.wait(timeout=3)
        return run(stage, batch)

    monkeypatch.setattr(Stage, "run", gated)
    yield found
    found.opened.set()
    found.released.set()


@contextmanager
def listening(service: Service, *, grpc: bool = False, **settings: Any) -> Iterator[str]:
    """Serve behind a socket, in a thread, and yield the address: with `grpc` that of gRPC too, after a space."""
    app = create_app(service, **settings)
    config = configured(app, port=0, timeout_graceful_shutdown=5)
    rpc = None
    if grpc:
        from cascade_rt.serving.inference_grpc import GRPCServer

        rpc = GRPCServer(app, "127.0.0.1", 0, max_body=service.settings.max_body)
    server = Server(config, service, idle_seconds=2.0, grpc=rpc)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not (server.started and (rpc is None or rpc.port)):
            assert thread.is_alive()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"{host}:{port}" + (f" {host}:{rpc.port}" if rpc else "")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def served(bundle: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Serve the cascade of three members with any settings, and return a client."""
    with ExitStack() as stack:

        def serve(sources: dict[str, str] | None = None, *, token: str | None = None, **settings: Any) -> httpx.Client:
            usual: dict[str, Any] = {"execution": Execution(threads=1), "reload_seconds": 0}
            service = Service(sources or {"toy": str(bundle)}, Settings(**usual | settings))
            address = stack.enter_context(listening(service, token=token, body_seconds=2.0))
            return stack.enter_context(httpx.Client(base_url=f"http://{address}", timeout=60))

        yield serve


@pytest.fixture(scope="module")
def address(bundle: Path, pair_bundle: Path) -> Iterator[str]:
    """A server with two bundles: `toy`, and `pairs`."""
    sources = {"toy": str(bundle), "pairs": str(pair_bundle)}
    with listening(Service(sources, Settings(execution=Execution(threads=1), allow_thresholds=True))) as found:
        yield found
