"""Ray Serve: bundles on a cluster, behind the interfaces of the server on one machine.

request -> Serve's proxy -> `Ingress` (tokens, exit rule, response) <-> replicas of each member in turn (`Member`)

Each member of each bundle is a deployment of its own, autoscaled by its queue. Bundles come from Ray's object store.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
from ray import cluster_resources, serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bundle.manifest import HIDDEN_STATES
from ..cluster import RemoteRuntime, cluster, shared
from ..engine.tokenization import Encoded
from ..errors import CascadeError, InputError, InvalidOption, first_line
from ..runtime import CascadeRuntime
from .app import create_app
from .batcher import Answer, Batcher, Observer
from .cluster_batcher import CallMember, ClusterBatcher, MicroBatch, Reply
from .envelope import PROBES
from .responses import error_response
from .server import KEEP_ALIVE, Setup, announce, listen, log_json
from .service import SPIN_US, Service, warm_up
from .settings import Settings

APPLICATION = "cascade-rt"
"""Name of the application in Serve."""

_INGRESS = "ingress"
_ANY = 1_000_000  # requests at a time: what limits them is `Settings.max_queue`
_CALLS = 64  # that a replica takes at a time: some micro-batches of single short texts
_HEALTH_SECONDS = 2.0  # between looks at a replica, which is replaced when it has died
_LAST_SECONDS = 5.0  # for the end of a replica after the grace that its requests have
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # requests are in our own log


@dataclass(frozen=True)
class Scaling:
    """How many replicas each member has."""

    min_replicas: int = 1
    max_replicas: int | None = None
    """None for what the cluster has room for when all members have the least."""
    target_requests: float = 8.0
    """Calls that a replica should have at a time, those that wait included; more start another replica."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value that is out of range."""
        if self.min_replicas < 1:
            raise InvalidOption("min_replicas", self.min_replicas, "at least 1")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise InvalidOption("max_replicas", self.max_replicas, f"at least {self.min_replicas}, the fewest")
        if not 0 < self.target_requests < math.inf:
            raise InvalidOption("target_requests", self.target_requests, "a number above 0")


class Member:
    """A replica of one member: batches the texts of many calls as a server on one machine does."""

    def __init__(self, remote: RemoteRuntime, name: str, settings: Settings) -> None:
        """Open the bundle, and load this member alone."""
        runtime = remote.open(
            provider=settings.provider,
            threads=settings.threads,
            provider_options=settings.provider_options,
            spin_us=SPIN_US,
        ).with_members([name])
        warm_up(runtime)
        self._batches: deque[MicroBatch] = deque()  # that no reply has named yet
        self._batcher = Batcher(runtime, max_queue=sys.maxsize, observer=self)

    async def __call__(self, encoded: Encoded) -> Reply | CascadeError:
        """Return the logits of texts, or what went wrong in the model."""
        arrived = monotonic()
        ticket, done = self._batcher.start(encoded)
        try:
            await done
        finally:
            self._batcher.cancel(ticket)  # does nothing to a ticket that is finished
        if isinstance(ticket.error, CascadeError):
            return ticket.error
        logits = np.array([answer.logits for answer in ticket.result()], dtype=np.float32)
        runs = [run._replace(queued=run.queued - arrived, started=run.started - arrived) for run in ticket.runs]
        return Reply(logits, runs, [self._batches.popleft() for _ in range(len(self._batches))])

    def batch(self, stage: int, waits: Sequence[float], tokens: int, seconds: float) -> None:
        """Remember a micro-batch for the metrics of the ingress."""
        self._batches.append(MicroBatch(waits, tokens, seconds))

    def answered(self, answer: Answer) -> None:
        """Leave answers to the ingress: here each member is the last."""


class ClusterEngine:
    """Runs members as deployments."""

    def __init__(self, bundles: Mapping[str, tuple[RemoteRuntime, Sequence[Any]]]) -> None:
        """`bundles`: how to open each, and the handles of its members, by name."""
        self._bundles = bundles

    def open(self, name: str, source: str, settings: Settings) -> CascadeRuntime:
        """Open a bundle and load none of its members."""
        remote, _ = self._bundles[name]
        return remote.open(
            provider=settings.provider, threads=settings.threads, provider_options=settings.provider_options
        )

    def batcher(self, name: str, runtime: CascadeRuntime, settings: Settings, observer: Observer) -> ClusterBatcher:
        """Return a batcher that calls the deployments."""
        _, handles = self._bundles[name]
        return ClusterBatcher(
            runtime,
            [_calling(handle) for handle in handles],
            max_queue=settings.max_queue,
            degrade=settings.degrade,
            observer=observer,
        )


def _calling(handle: Any) -> CallMember:
    async def call(encoded: Encoded) -> Reply | CascadeError:
        response = handle.remote(encoded)
        try:
            found: Reply | CascadeError = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return found

    return call


@serve.ingress()
class Ingress:
    """Speaks HTTP, tokenizes, calls the members in turn and applies the exit rule."""

    def __init__(self, setup: Setup, bundles: Mapping[str, tuple[RemoteRuntime, Sequence[Any]]]) -> None:
        """Open the bundles; the arguments are those of the server, and of `ClusterEngine`."""
        log_json()
        self._service = setup.open(ClusterEngine(bundles))
        app = create_app(self._service, token=setup.token, cors_origins=setup.cors_origins)
        self._app = _DrainMiddleware(app, self._service)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application; Serve calls this."""
        return self._app

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that are open, at most so many seconds."""
        self._service.draining = True
        until = monotonic() + seconds
        while self._app.open and monotonic() < until:
            await asyncio.sleep(0.05)


class _DrainMiddleware:
    """The application while it takes requests.

    On one machine, the process that stops does not listen any more; here Serve's proxy does.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.open = 0
        """Requests that are not answered yet."""
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._service.draining and scope["path"] not in PROBES:
            message = "the server is stopping; try another one"
            response = error_response(503, message, "overloaded", headers={"Retry-After": "1"})
            await response(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":  # the proxy adds the same id
                headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        self.open += 1
        try:
            await self._app(scope, receive, sending)
        finally:
            self.open -= 1


def serve_on_cluster(setup: Setup, scaling: Scaling, address: str | None) -> None:
    """Serve on a Ray cluster until a signal ends this process; then let open requests finish.

    `address`: see `cluster`. Raises InputError where Serve runs already, and the errors of `CascadeRuntime`.
    """
    if setup.settings.threads is None:
        setup = replace(setup, settings=replace(setup.settings, threads=1))
    settings = setup.settings
    runtimes = {name: _opened(name, source, settings) for name, source in setup.sources.items()}
    with listen(setup.host, setup.port) as free:  # raises the error of a port that is taken
        setup = replace(setup, port=free.getsockname()[1])
    with ExitStack() as ending, cluster(address):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if serve.status().proxies:
            raise InputError(
                "found Ray Serve at work on this cluster, where it listens on one port for all applications, expected "
                "none; stop it with: serve shutdown, or name the address of another cluster"
            )
        try:
            plan = _Plan.of(runtimes, settings, scaling)
            _deploy(setup, runtimes, plan)
            announce([*(f"{name}: {runtime}" for name, runtime in runtimes.items()), str(plan)], setup, setup.port)
            _watch()
        finally:
            _drain(setup.grace)
            nowhere = ending.enter_context(Path(os.devnull).open("w"))
            ending.enter_context(redirect_stdout(nowhere))  # Ray names every actor that it ends
            with suppress(Exception):  # the cluster may be gone
                serve.shutdown()


def _opened(name: str, source: str, settings: Settings) -> CascadeRuntime:
    runtime = CascadeRuntime(
        source, provider=settings.provider, threads=settings.threads, provider_options=settings.provider_options
    )
    if any(member.reads == HIDDEN_STATES for member in runtime.bundle.members):
        raise InputError(
            f"{name}: found a multi-exit model, expected a cascade on a Ray cluster: hidden states, which its members "
            "read, are too large to send between machines; serve it without a cluster"
        )
    return runtime


@dataclass(frozen=True)
class _Plan:
    """What replicas reserve, and how many there may be."""

    cpus: float
    gpus: float
    least: int
    most: int
    target: float
    threads: int

    @classmethod
    def of(cls, runtimes: Mapping[str, CascadeRuntime], settings: Settings, scaling: Scaling) -> _Plan:
        """Reserve a replica's threads, or a GPU; less where not all members would find room."""
        found, threads = cluster_resources(), settings.threads or 1
        least = scaling.min_replicas
        replicas = least * sum(len(runtime.bundle.members) for runtime in runtimes.values())
        on_gpu = "cuda" in settings.provider.lower()
        room = found.get("GPU" if on_gpu else "CPU", 0)
        if on_gpu and not room:
            raise InvalidOption("provider", settings.provider, "cpu: the cluster has no GPU")
        each = _share(1 if on_gpu else threads, room / replicas)
        more = int((room - replicas * each) / each) if each else 0
        most = scaling.max_replicas or least + more
        cpus, gpus = (0.0, each) if on_gpu else (each, 0.0)
        return cls(cpus, gpus, least, most, scaling.target_requests, threads)

    def deployment(self) -> dict[str, Any]:
        """Return the options of a member's deployment."""
        scaling = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": self.target,
        }
        return {
            "autoscaling_config": scaling,
            "max_ongoing_requests": max(_CALLS, math.ceil(2 * self.target)),
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }

    def __str__(self) -> str:
        where = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} thread{'s' * (self.threads > 1)}"
        count = f"{self.least} to {self.most}" if self.most > self.least else f"{self.least}"
        return f"on Ray: {count} replica{'s' * (self.most > 1)} of each member, with {where} each"


def _share(wanted: float, room: float) -> float:
    """Return what a replica reserves: what it wants, or less; Ray takes whole numbers and fractions below 1."""
    if room >= wanted:
        return wanted
    return math.floor(room) if room >= 1 else math.floor(100 * room) / 100


def _deploy(setup: Setup, runtimes: Mapping[str, CascadeRuntime], plan: _Plan) -> None:
    """Start Serve and the application; raise CascadeError where it cannot start."""
    often = {"health_check_period_s": _HEALTH_SECONDS, "max_constructor_retry_count": 1}
    member = serve.deployment(Member).options(**plan.deployment(), **often)
    bundles = {}
    for name, runtime in runtimes.items():
        remote = shared(runtime)  # stays in the object store as long as this process, for replicas that start later
        names = [entry.name for entry in runtime.bundle.members]
        deployments = [member.options(name=f"{name}:{one}".replace("#", "_")) for one in names]
        bundles[name] = (
            remote,
            [deployment.bind(remote, one, setup.settings) for deployment, one in zip(deployments, names, strict=True)],
        )
    ingress = serve.deployment(Ingress).options(
        name=_INGRESS,
        max_ongoing_requests=_ANY,
        graceful_shutdown_timeout_s=setup.grace,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _tracing_variables()} if setup.traces else {}},
        **often,
    )
    http = {"host": setup.host, "port": setup.port, "keep_alive_timeout_s": KEEP_ALIVE}
    try:
        serve.start(http_options=http, logging_config=_QUIET)
        serve.run(ingress.bind(setup, bundles), name=APPLICATION, logging_config=_QUIET)
    except (RuntimeError, TimeoutError) as error:
        raise CascadeError(f"the members cannot start on the cluster ({_reason(error)})") from error


def _tracing_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


def _reason(error: Exception) -> str:
    """Return the message of a replica's error, which ends its traceback."""
    with suppress(Exception):
        for deployment in serve.status().applications[APPLICATION].deployments.values():
            if deployment.message:
                last: str = deployment.message.strip().splitlines()[-1]
                return last.partition(": ")[2] or last
    return first_line(error)


def _watch() -> None:
    """Wait for a signal; raise CascadeError if the application ends otherwise."""
    while True:
        with suppress(Exception):  # Serve's controller starts again; where the cluster is gone, Ray ends this process
            if APPLICATION not in serve.status().applications:
                break
        sleep(_HEALTH_SECONDS)
    raise CascadeError("the application was deleted from the cluster; start the server again")


def _drain(seconds: float) -> None:
    """Let open requests finish, if there may be some."""
    with suppress(Exception):  # the application did not start, or the cluster is gone
        if serve.status().applications[APPLICATION].deployments[_INGRESS].status == "HEALTHY":
            serve.get_app_handle(APPLICATION).drain.remote(seconds).result(timeout_s=seconds + _LAST_SECONDS)
