"""The process: logs, signals, and uvicorn."""

from __future__ import annotations

import logging
import socket
import sys
from types import FrameType

import uvicorn
from pythonjsonlogger.json import JsonFormatter

from ..errors import InputError, InvalidOption
from .app import create_app
from .service import Service

_BACKLOG = 2048
_LAST_PORT = 65535


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise InputError where it cannot. `port` 0: any that is free."""
    if not 0 <= port <= _LAST_PORT:
        raise InvalidOption("port", port, f"a number from 0 to {_LAST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port") from error


def serve(
    service: Service,
    listener: socket.socket,
    *,
    grace: float,
    token: str | None,
    cors_origins: tuple[str, ...],
) -> None:
    """Serve until SIGTERM or SIGINT: then refuse new requests, answer the others within `grace` seconds, and return."""
    log_json()
    app = create_app(service, token=token, cors_origins=cors_origins)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,  # longer than the 60 s of common load balancers, which else reuse closed connections
        timeout_graceful_shutdown=round(grace),
    )
    _Server(config, service).run(sockets=[listener])


def log_json() -> None:
    """Write log records to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter("{message}{levelname}", style="{", timestamp=True, rename_fields={"levelname": "level"})
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Server(uvicorn.Server):
    """Says at once that it is no longer ready, so that probes take it out of service."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self._service.draining = True
        super().handle_exit(sig, frame)

    def startup_message(self) -> None:
        """Leave uvicorn's out."""
