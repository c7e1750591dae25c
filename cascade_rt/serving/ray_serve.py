"""Ray Serve: bundles on a cluster, by replicas of the server on one machine.

request -> Serve's proxy -> a `Replica`, which has the same application, bundles and batcher

There is one deployment, autoscaled by the requests under way. Bundles come from Ray's object store.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import ray
from ray import cluster_resources, serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bundle.files import FileIdentity
from ..bundle.hub import repository
from ..cluster import RemoteBundle, cluster, shared
from ..engine.execution import Execution
from ..engine.providers import needs_gpu
from ..errors import CascadeError, InputError, InvalidOption, first_line
from ..runtime import CascadeRuntime
from .app import create_app
from .envelope import PROBES
from .metrics import Measured
from .models import identity
from .responses import error_response
from .server import KEEP_ALIVE, Setup, announce, listen, log_json
from .service import Service, open_runtime
from .settings import Scaling

APPLICATION = "cascade-rt"
"""Name of the application in Serve."""

_REPLICA = "server"
_ANY = 1_000_000  # requests at a time: what limits them is `Settings.max_queue`
_HEALTH_SECONDS = 2.0  # between looks at a replica, which is replaced when it has died
_LAST_SECONDS = 5.0  # for the end of a replica after the grace that its requests have
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # requests are in our own log


class Bundles:
    """The bundles on the machine where the server was started, for replicas on any machine; an actor."""

    def __init__(self) -> None:
        self._shared: dict[str, tuple[FileIdentity | None, RemoteBundle]] = {}

    def identity(self, source: str) -> FileIdentity | None:
        """Return the identity of the bundle that is there now."""
        return identity(source)

    def get(self, source: str) -> RemoteBundle:
        """Put the bundle that is there now into the object store, once; return how to open it anywhere."""
        found = identity(source)
        if source not in self._shared or self._shared[source][0] != found:
            self._shared[source] = found, shared(CascadeRuntime(source))
        return self._shared[source][1]


@serve.ingress()
class Replica:
    """The server of one machine, behind Serve's proxy."""

    def __init__(self, setup: Setup, bundles: Any) -> None:
        """Open the bundles that an actor, `Bundles`, has."""

        def fetched(source: str, execution: Execution) -> CascadeRuntime:
            remote: RemoteBundle = _got(bundles.get.remote(source))
            return remote.open(execution)

        log_json()
        self._service = setup.open(fetched, lambda source: _got(bundles.identity.remote(source)))
        self._service.measure = self._measure
        app = create_app(self._service, token=setup.token, cors_origins=setup.cors_origins)
        self._app = _DrainMiddleware(app, self._service)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application; Serve calls this."""
        return self._app

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that are open, at most `seconds`."""
        self._service.draining = True
        until = monotonic() + seconds
        while self._app.open and monotonic() < until:
            await asyncio.sleep(0.05)

    async def measured(self) -> tuple[str, Measured]:
        """Return this replica's name and metrics."""
        return serve.get_replica_context().replica_id.unique_id, await self._service.measured()

    async def _measure(self) -> Measured:
        """Return the metrics of all replicas; of those that end meanwhile, none."""
        asked = serve.get_app_handle(APPLICATION).broadcast("measured")
        found = await asked.results_async(timeout_s=_HEALTH_SECONDS, return_exceptions=True)
        return Measured.of_replicas(sorted(one for one in found if not isinstance(one, Exception)))


def _got(reference: Any) -> Any:
    """Return what an actor answered, or raise its own error."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


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
    execution = setup.settings.execution
    if execution.threads is None:
        execution = replace(execution, threads=1)
        setup = replace(setup, settings=replace(setup.settings, execution=execution))
    stride, aggregate = setup.settings.stride, setup.settings.aggregate
    runtimes = {
        name: open_runtime(source, execution).with_stride(stride, aggregate) for name, source in setup.sources.items()
    }
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
            plan = _Plan.of(execution, scaling)
            _deploy(setup, plan)
            announce([*(f"{name}: {runtime}" for name, runtime in runtimes.items()), str(plan)], setup, setup.port)
            _watch()
        finally:
            _drain(setup.grace)
            nowhere = ending.enter_context(Path(os.devnull).open("w"))
            ending.enter_context(redirect_stdout(nowhere))  # Ray names every actor that it ends
            with suppress(Exception):  # the cluster may be gone
                serve.shutdown()


@dataclass(frozen=True)
class _Plan:
    """The resources of a replica, and the numbers of replicas."""

    cpus: float
    gpus: float
    least: int
    most: int
    target: float
    threads: int

    @classmethod
    def of(cls, execution: Execution, scaling: Scaling) -> _Plan:
        """Reserve a replica's threads, or a GPU; less where the cluster has no room for the fewest."""
        found, threads = cluster_resources(), execution.threads or 1
        on_gpu = needs_gpu(execution.provider)
        room = found.get("GPU" if on_gpu else "CPU", 0)
        if on_gpu and not room:
            raise InvalidOption("provider", execution.provider, "cpu: the cluster has no GPU")
        least = scaling.min_replicas
        each = _share(1 if on_gpu else threads, room / least)
        most = scaling.max_replicas or max(least, int(room / each) if each else 0)
        cpus, gpus = (0.0, each) if on_gpu else (each, 0.0)
        return cls(cpus, gpus, least, most, scaling.target_requests, threads)

    def deployment(self) -> dict[str, Any]:
        """Return the options of the deployment."""
        scaling = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": self.target,
        }
        return {
            "autoscaling_config": scaling,
            "max_ongoing_requests": _ANY,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }

    def __str__(self) -> str:
        where = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} thread{'s' * (self.threads > 1)}"
        count = f"{self.least} to {self.most}" if self.most > self.least else f"{self.least}"
        return f"on Ray: {count} replica{'s' * (self.most > 1)} with {where} each"


def _share(wanted: float, room: float) -> float:
    """Return what a replica reserves: what it wants, or less; Ray takes whole numbers and fractions below 1."""
    if room >= wanted:
        return wanted
    return math.floor(room) if room >= 1 else math.floor(100 * room) / 100


def _deploy(setup: Setup, plan: _Plan) -> None:
    """Start Serve and the application; raise CascadeError where it cannot start."""
    options = plan.deployment()
    if setup.traces:
        options["ray_actor_options"]["runtime_env"] = {"env_vars": _tracing_variables()}
    replica = serve.deployment(Replica).options(
        name=_REPLICA,
        graceful_shutdown_timeout_s=setup.grace,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=1,
        **options,
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Bundles)
    bundles = actor.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1).remote()
    sources = {
        name: source if repository(source) else str(Path(source).absolute()) for name, source in setup.sources.items()
    }
    http = {"host": setup.host, "port": setup.port, "keep_alive_timeout_s": KEEP_ALIVE}
    try:
        serve.start(http_options=http, logging_config=_QUIET)
        serve.run(replica.bind(replace(setup, sources=sources), bundles), name=APPLICATION, logging_config=_QUIET)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise CascadeError(f"the replicas cannot start on the cluster ({_reason(error)})") from error


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
        if serve.status().applications[APPLICATION].deployments[_REPLICA].status == "HEALTHY":
            asked = serve.get_app_handle(APPLICATION).broadcast("drain", seconds)
            asked.results(timeout_s=seconds + _LAST_SECONDS, return_exceptions=True)
