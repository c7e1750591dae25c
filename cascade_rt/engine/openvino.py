"""Members run by OpenVINO in place of ONNX Runtime, from the same ONNX files."""

from __future__ import annotations

import importlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from ..errors import first_line

Feed = Mapping[str, NDArray[Any]]
"""Arrays by input name."""

# By itself, OpenVINO computes in bf16 where the CPU can, which is less accurate, and pins its threads to cores, which
# slows down whatever else runs there.
_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": "NO"}
_TELEMETRY = "openvino_telemetry"
_importing = Lock()


class OpenVinoSession:
    """A compiled model, with the part of ONNX Runtime's session that stages use; safe to use from several threads."""

    def __init__(self, path: Path, threads: int, options: Mapping[str, str]) -> None:
        """Compile the ONNX file at `path`; `options`: OpenVINO's properties for CPUs, by name.

        Raises ValueError for a property that it does not have.
        """
        self._threads = threads
        self._settings: dict[str, Any] = {**_SETTINGS, "INFERENCE_NUM_THREADS": threads, **options}
        self._core = load_openvino().Core()
        try:
            self._core.set_property("CPU", dict(options))
            self._core.get_property("CPU", "FULL_DEVICE_NAME")  # only now are the options read
        except RuntimeError as error:
            raise ValueError(f"properties of OpenVINO for CPUs ({first_line(error)})") from error
        self._model = self._core.read_model(path)
        self._before_fork: list[Any] = []
        self._compiling = Lock()
        self._compile()
        self.inputs: list[str] = [port.get_any_name() for port in self._model.inputs]
        self.outputs: list[str] = [port.get_any_name() for port in self._model.outputs]

    def _compile(self) -> None:
        self._for_one = self._model_for("LATENCY")
        self._for_many: Any = None
        self._idle: list[Any] = []
        self._process = os.getpid()

    def _compile_after_fork(self) -> None:
        """Compile again in a child process, which does not inherit the threads of its parent's models.

        Those models are kept: destroying them would wait for their threads.
        """
        if self._process == os.getpid():
            return
        with self._compiling:
            if self._process != os.getpid():
                self._before_fork += [self._core, self._for_one, self._for_many, self._idle]
                self._core = load_openvino().Core()
                self._compile()

    def run(self, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """Run one micro-batch with all threads."""
        self._compile_after_fork()
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._for_one.create_infer_request()
        request.infer(feed, share_inputs=True)
        found = _outputs(request, outputs)
        self._idle.append(request)
        return found

    def run_each(self, outputs: Sequence[str], feeds: Iterator[Feed]) -> Iterator[list[NDArray[Any]]]:
        """Run micro-batches in order, as many at a time as is fastest: each has a part of the threads."""
        some = list(islice(feeds, 2))
        feeds = chain(some, feeds)
        if len(some) < 2 or self._threads == 1:
            yield from (self.run(outputs, feed) for feed in feeds)
            return
        self._compile_after_fork()
        with self._compiling:
            self._for_many = self._for_many or self._model_for("THROUGHPUT")
        idle = [self._for_many.create_infer_request() for _ in range(self._threads + 1)]
        running = deque[Any]()
        for feed in feeds:
            if not idle:
                yield self._finished(running, outputs, idle)
            request = idle.pop()
            request.start_async(feed)
            running.append(request)
        while running:
            yield self._finished(running, outputs, idle)

    def _finished(self, running: deque[Any], outputs: Sequence[str], idle: list[Any]) -> list[NDArray[Any]]:
        request = running.popleft()
        request.wait()
        found = _outputs(request, outputs)
        idle.append(request)
        return found

    def _model_for(self, hint: str) -> Any:
        return self._core.compile_model(self._model, "CPU", {"PERFORMANCE_HINT": hint, **self._settings})


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry package; OpenVINO then uses a stub of its own."""
    with _importing:
        if "openvino" in sys.modules:
            return sys.modules["openvino"]
        missing = object()
        before = sys.modules.get(_TELEMETRY, missing)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # so its import fails
        try:
            return importlib.import_module("openvino")
        finally:
            if before is missing:
                del sys.modules[_TELEMETRY]
            else:
                sys.modules[_TELEMETRY] = before  # type: ignore[assignment]


def _outputs(request: Any, names: Sequence[str]) -> list[NDArray[Any]]:
    return [request.get_tensor(name).data.copy() for name in names]  # the next run overwrites them
