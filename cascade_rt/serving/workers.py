"""Several processes that serve the same bundles on one port, each on CPUs of its own.

The kernel spreads connections over the processes. One that dies is replaced; metrics are those of all together.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic, sleep

from prometheus_client.multiprocess import mark_process_dead

from ..engine.cpus import cpu_shares, usable_cpus
from ..errors import CascadeError, InputError, InvalidOption
from .metrics import FOLDER
from .server import Setup, announce, described, listen, log_json, serve

_RESTART_SECONDS = 1.0  # at least between two starts of a worker
_LAST_SECONDS = 5.0  # for a worker to end after the grace that its requests have
_log = logging.getLogger(__name__)


def serve_with_workers(setup: Setup, count: int) -> None:
    """Serve by `count` processes until a signal ends this one; then let them answer what they have.

    Raises InvalidOption for more workers than CPUs, and the error of a worker that cannot start.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InvalidOption("workers", count, "1: several workers share a port and pin their CPUs only on Linux")
    shares = cpu_shares(count)
    execution = setup.settings.execution
    threads = execution.threads or usable_cpus() // count
    setup = replace(setup, settings=replace(setup.settings, execution=replace(execution, threads=threads)))
    with listen(setup.host, setup.port) as free:  # raises the error of a port that is taken
        setup = replace(setup, port=free.getsockname()[1])
    with setup.with_grpc_port() as setup, TemporaryDirectory(prefix="cascade-metrics-") as folder:
        os.environ[FOLDER] = folder
        log_json()
        workers = [_Worker(setup, share) for share in shares]
        try:
            for worker in workers:
                worker.start()
            served = [worker.wait_until_ready() for worker in workers]
            where = "; ".join(",".join(map(str, share)) for share in shares)
            announce(
                [*served[0], f"{count} workers with {threads} threads each, on the CPUs {where}"], setup, setup.port
            )
            while True:
                connection.wait([worker.sentinel for worker in workers])
                for worker in workers:
                    worker.replace_if_dead(folder)
        finally:
            for worker in workers:
                worker.terminate()
            until = monotonic() + setup.grace + _LAST_SECONDS
            for worker in workers:
                worker.join(until)


class _Worker:
    """A process that serves, and its successors."""

    def __init__(self, setup: Setup, cpus: Sequence[int]) -> None:
        self._setup = setup
        self._cpus = cpus
        self._started = 0.0

    @property
    def sentinel(self) -> int:
        """Handle that `multiprocessing.connection.wait` finds ready when the process has ended."""
        return self._process.sentinel

    def start(self) -> None:
        """Start the process, which opens the bundles."""
        self._ready, ready = get_context("spawn").Pipe(duplex=False)
        self._process = get_context("spawn").Process(target=_work, args=(self._setup, self._cpus, ready))
        self._process.start()
        self._started = monotonic()
        ready.close()

    def wait_until_ready(self) -> list[str]:
        """Return what it serves as soon as it does, one line for each bundle; raise its error where it cannot."""
        if isinstance(found := self._told(), CascadeError):
            raise found
        if found is None:
            self._process.join()
            raise CascadeError(f"a worker ended with status {self._process.exitcode} before it served")
        return found

    def _told(self) -> list[str] | CascadeError | None:
        """Wait for what the process has to tell, and return None after its end."""
        try:
            found: list[str] | CascadeError = self._ready.recv()
        except EOFError:
            return None
        return found

    def replace_if_dead(self, metrics: str) -> None:
        """Start a new process in place of one that has ended."""
        if self._process.is_alive():
            return
        told = self._told()
        error = str(told) if isinstance(told, CascadeError) else None
        died = {"pid": self._process.pid, "status": self._process.exitcode, "error": error}
        _log.error("worker died", extra=died)
        mark_process_dead(self._process.pid, metrics)  # type: ignore[no-untyped-call]
        sleep(max(0.0, self._started + _RESTART_SECONDS - monotonic()))
        self.start()

    def terminate(self) -> None:
        """Ask the process to end."""
        if self._started:
            self._process.terminate()

    def join(self, until: float) -> None:
        """Wait for the end of the process, and enforce it after a moment of `time.monotonic`."""
        if self._started:
            self._process.join(max(0.0, until - monotonic()))
            self._process.kill()
            self._process.join()


def _work(setup: Setup, cpus: Sequence[int], ready: Connection) -> None:
    """Pin this process, open the bundles, listen and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; ours ends the workers
    Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, cpus)
    try:
        service = setup.open()
        listener = listen(setup.host, setup.port, shared=True)
    except (CascadeError, OSError) as error:
        ready.send(error if isinstance(error, CascadeError) else InputError(str(error)))
        sys.exit(2)
    ready.send(described(service))
    ready.close()
    with listener:
        serve(service, listener, setup)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
