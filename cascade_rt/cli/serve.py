"""Serve bundles over HTTP.

It speaks the interfaces of Text Embeddings Inference (TEI) and of the Open Inference Protocol, and its own.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, InvalidOption, MissingExtraError
from ..serving.settings import Scaling, Settings
from .options import RAY, add_engine, add_running, add_windows, execution, of_options, refuse_without_ray
from .parser import CommandParser
from .signals import Termination

if TYPE_CHECKING:  # of an extra
    from ..serving.server import Setup

SUMMARY = "serve bundles over HTTP"
EXAMPLE = "cascade-rt serve --model-dir bundle/ --port 8000"

_FOR_RAY: dict[str, Any] = {"address": None, **asdict(Scaling())}
"""Options for clusters alone, and their defaults."""


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--model-dir", metavar="DIR", help='bundle, a folder or "hf:org/name"; its name is "default"')
    parser.reads("model_dir")
    add("--model", action="append", default=[], metavar="NAME=DIR", help="another bundle and its name; repeatable")
    parser.reads("model", paths=lambda entry: [entry.partition("=")[2]])
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--grpc-port", type=int, metavar="PORT", help="speak the Open Inference Protocol over gRPC too, on this port")
    add(
        "--max-wait-ms",
        type=float,
        default=Settings.max_wait_ms,
        help="how long a batch that is not full may wait while other members have texts",
    )
    add("--max-queue", type=int, default=Settings.max_queue, help="texts accepted and not yet answered, per bundle")
    add("--max-texts", type=int, default=Settings.max_texts, help="texts in one request")
    add("--max-body-mb", type=float, default=Settings.max_body / 2**20, help="size of a request's body")
    add("--timeout", type=float, default=Settings.timeout, help="seconds for a request without X-Deadline-Ms")
    add(
        "--degrade",
        action="store_true",
        help="answer by the last member that ran where a deadline leaves no time for the next",
    )
    add("--allow-thresholds", action="store_true", help="let requests set their own thresholds")
    add("--log-texts", action="store_true", help="log texts and answers too, not only requests")
    add("--traces", action="store_true", help="send OpenTelemetry traces to what OTEL_EXPORTER_OTLP_ENDPOINT names")
    add(
        "--reload-seconds",
        type=float,
        default=Settings.reload_seconds,
        help="how often to look for a replaced bundle; 0 for never",
    )
    add("--grace", type=float, default=30.0, help="seconds for open requests after SIGTERM")
    add("--workers", type=int, default=1, help="processes that serve side by side, each on CPUs of its own")
    add("--token-file", metavar="FILE", help="file with the bearer token that requests must carry")
    parser.reads("token_file")
    add(
        "--root-path",
        default=Settings.root_path,
        metavar="PATH",
        help="prefix of the server's paths behind a proxy, for instance /sentiment",
    )
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="pages of this origin may call the server")
    add_windows(parser)
    add_running(parser)
    ray = add_engine(parser).add_argument
    ray("--min-replicas", type=int, metavar="N", help="fewest replicas of the server")
    ray("--max-replicas", type=int, metavar="N", help="most replicas of the server (default: what fits)")
    ray(
        "--target-requests", type=float, metavar="N", help="requests under way per replica; above it, Ray adds replicas"
    )
    parser.set_defaults(**_FOR_RAY)


def run(options: argparse.Namespace) -> None:
    """Open the bundles and serve."""
    try:
        from ..serving.server import Setup, announce, described, listen, serve  # noqa: PLC0415
        from ..serving.workers import serve_with_workers  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("serving", "serve", error) from error
    settings = of_options(
        Settings,
        options,
        execution=execution(options),
        max_body=round(options.max_body_mb * 2**20),
        root_path=options.root_path.rstrip("/"),
    )
    setup = Setup(
        _sources(options),
        settings,
        options.host,
        options.port,
        options.grace,
        _token(options.token_file),
        tuple(options.cors_origin),
        options.traces,
        options.grpc_port,
    )
    with suppress(KeyboardInterrupt, Termination):  # the signal that ended it, after all was answered
        if options.engine == RAY:
            _serve_on_cluster(setup, options)
            return
        refuse_without_ray(options, _FOR_RAY)
        if options.workers != 1:
            serve_with_workers(setup, options.workers)
            return
        with listen(setup.host, setup.port) as listener, setup.with_grpc_port() as setup:
            service = setup.open()
            announce(described(service), setup, listener.getsockname()[1])
            serve(service, listener, setup)


def _serve_on_cluster(setup: Setup, options: argparse.Namespace) -> None:
    if options.grpc_port is not None:
        raise InvalidOption("grpc_port", options.grpc_port, "none with --engine ray, which serves only HTTP")
    try:
        from ..serving.ray_serve import serve_on_cluster  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("--engine ray", "ray", error) from error
    if options.workers != 1:
        raise InvalidOption("workers", options.workers, "1 with --engine ray, where --max-replicas is what counts")
    serve_on_cluster(setup, of_options(Scaling, options), options.address)


def _sources(options: argparse.Namespace) -> dict[str, str]:
    sources = {"default": options.model_dir} if options.model_dir else {}
    for entry in options.model:
        name, separator, folder = entry.partition("=")
        if not (separator and name and folder) or "/" in name or name in sources:
            raise InputError(f"found --model {entry}, expected NAME=DIR, each name once")
        sources[name] = folder
    if not sources:
        raise InputError("found no bundle, expected --model-dir, --model or both (see: cascade-rt serve --help)")
    return sources


def _token(file: str | None) -> str | None:
    if file is None:
        return None
    token = Path(file).read_text("utf-8").strip()
    if not token or any(ord(character) < 33 or ord(character) > 126 for character in token):
        raise InputError(f"{file}: found no usable token, expected one line of visible ASCII characters")
    return token
