"""The process: logs, signals, and uvicorn."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import uvicorn
from pythonjsonlogger.json import JsonFormatter
from starlette.types import ASGIApp

from ..errors import InputError, InvalidOption, MissingExtraError
from .app import create_app
from .envelope import LOGGED, REQUESTS
from .models import Identify, identity
from .responses import dumps
from .service import OpenRuntime, Service, open_runtime
from .settings import Settings
from .upgrades import Http11Protocol

if TYPE_CHECKING:  # of an extra
    from .inference_grpc import GRPCServer

_BACKLOG = 2048
KEEP_ALIVE = 65  # seconds: longer than the 60 of common load balancers, which else reuse closed connections
_IDLE_SECONDS = 70.0
_LAST_PORT = 65535


@dataclass(frozen=True)
class Setup:
    """Bundles, address and settings of a server."""

    sources: dict[str, str]
    """Bundles, folder or "hf:org/name", by name."""
    settings: Settings
    host: str
    port: int
    """0 for any that is free."""
    grace: float
    """Seconds for open requests when it ends."""
    token: str | None = None
    """See `create_app`."""
    cors_origins: tuple[str, ...] = ()
    traces: bool = False
    """True to trace requests: see `tracing`."""
    grpc_port: int | None = None
    """Where the Open Inference Protocol is spoken over gRPC too; 0 for any that is free, None for nowhere."""

    @contextmanager
    def with_grpc_port(self) -> Iterator[Setup]:
        """Yield the setup with a port for gRPC that no other server takes; raise InputError, or MissingExtraError."""
        if self.grpc_port is None:
            yield self
            return
        try:
            from . import inference_grpc  # noqa: F401, PLC0415
        except ImportError as error:
            raise MissingExtraError("--grpc-port", "grpc", error) from error
        with listen(self.host, self.grpc_port, option="grpc_port") as free:
            port, family = free.getsockname()[1], free.family
        with socket.socket(family) as held:  # bound and not listening, beside those of gRPC
            if hasattr(socket, "SO_REUSEPORT"):
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                held.bind((self.host, port))
            yield replace(self, grpc_port=port)

    def grpc_server(self, app: ASGIApp) -> GRPCServer | None:
        """Return what serves an application over gRPC, if that is wanted."""
        if self.grpc_port is None:
            return None
        from .inference_grpc import GRPCServer  # noqa: PLC0415

        return GRPCServer(app, self.host, self.grpc_port, max_body=self.settings.max_body)

    def open(self, open_runtime: OpenRuntime = open_runtime, identify: Identify = identity) -> Service:
        """Open the bundles; raise MissingExtraError where traces need packages that are not installed.

        The arguments are those of `Service`.
        """
        if not self.traces:
            return Service(self.sources, self.settings, None, open_runtime, identify)
        try:
            from .tracing import Tracing  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtraError("--traces", "traces", error) from error
        return Service(self.sources, self.settings, Tracing(), open_runtime, identify)


def listen(host: str, port: int, *, shared: bool = False, option: str = "port") -> socket.socket:
    """Return a socket that listens; raise InputError where it cannot. `port` 0: any that is free.

    `shared`: other sockets may listen there too, if they are shared and of the same user.
    `option`: name of the port in errors.
    """
    if not 0 <= port <= _LAST_PORT:
        raise InvalidOption(option, port, f"a number from 0 to {_LAST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port") from error


def described(service: Service) -> list[str]:
    """Return one line for each bundle that is served."""
    return [f"{model.name}: {model.runtime}" for model in service.models]


def announce(lines: Sequence[str], setup: Setup, port: int) -> None:
    """Say on standard error what is served, and where."""
    where = f"serving on http://{setup.host}:{port}, interfaces at {setup.settings.root_path}/docs"
    if setup.grpc_port is not None:
        where += f", gRPC on {setup.host}:{setup.grpc_port}"
    print(*lines, where, sep="\n", file=sys.stderr, flush=True)


def serve(service: Service, listener: socket.socket, setup: Setup) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; then take no more requests, answer the others, and return."""
    log_json()
    app = create_app(service, token=setup.token, cors_origins=setup.cors_origins)
    config = configured(app, timeout_graceful_shutdown=round(setup.grace))
    gc.freeze()  # what is loaded by now stays, so it is not looked through again and again
    server = Server(config, service, grpc=setup.grpc_server(app))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn handles SIGTERM and SIGINT alone
    server.run(sockets=[listener])


def configured(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """Return uvicorn's settings for an application; `more` of them may be given."""
    return uvicorn.Config(
        app,
        http=Http11Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        **more,
    )


def log_json() -> None:
    """Write log records to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Lines("{message}{levelname}", style="{", timestamp=True, rename_fields={"levelname": "level"})
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Lines(JsonFormatter):
    """JSON lines; those of requests, which all have the same fields, take less time."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        if record.name != REQUESTS:
            return super().format(record)
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
        row = {"message": record.msg, "level": record.levelname, "timestamp": time}
        found = record.__dict__
        return dumps(row | {name: found[name] for name in LOGGED if name in found}).decode()


class Server(uvicorn.Server):
    """Uvicorn's server, which also closes idle connections, and is not ready as soon as it begins to stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        *,
        idle_seconds: float = _IDLE_SECONDS,
        grpc: GRPCServer | None = None,
    ) -> None:
        """`idle_seconds`: how long a connection may have no request under way, also while headers trickle in.

        `grpc`: a server that starts and ends with this one.
        """
        super().__init__(config)
        self._service = service
        self._grpc = grpc
        self._idle_seconds = idle_seconds
        self._idle_since: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop: probes then take the server out of use."""
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve gRPC too."""
        if self._grpc is not None:
            self._grpc.tasks = self.server_state.tasks  # uvicorn waits for them
            await self._grpc.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests and calls, and let those that are open end."""
        if self._grpc is None:
            await super().shutdown(sockets)
            return
        stopping = asyncio.create_task(self._grpc.stop(self.config.timeout_graceful_shutdown))
        await super().shutdown(sockets)
        await self._grpc.stop(None)
        await stopping

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and once a second close idle connections."""
        if counter % 10 == 0:
            self._close_idle()
        return await super().on_tick(counter)

    def _close_idle(self) -> None:
        """Close connections without a request for too long; uvicorn's limit ends with the first byte of a request."""
        now = monotonic()
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                self._idle_since.pop(connection, None)
                continue
            last, since = self._idle_since.setdefault(connection, (cycle, now))
            if last is not cycle:
                self._idle_since[connection] = cycle, now
            elif now - since > self._idle_seconds and (transport := getattr(connection, "transport", None)) is not None:
                transport.close()
