"""Members run by OpenVINO in place of ONNX Runtime, from the same ONNX files."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
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

    def __init__(self, path: Path, threads: int, options: Mapping[str, str], *, share_threads: bool = False) -> None:
        """Compile the ONNX file at `path`; `options`: OpenVINO's properties for CPUs, by name.

        `share_threads`: whether runs at the same time each have a part of the threads, else one has all. Raises
        ValueError for a property that OpenVINO does not have.
        """
        hint = "THROUGHPUT" if share_threads else "LATENCY"
        self._settings = {"PERFORMANCE_HINT": hint, **_SETTINGS, "INFERENCE_NUM_THREADS": threads, **options}
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
        self._compiled = self._core.compile_model(self._model, "CPU", self._settings)
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
                self._before_fork += [self._core, self._compiled, self._idle]
                self._core = load_openvino().Core()
                self._compile()

    def run(self, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """Run one micro-batch."""
        self._compile_after_fork()
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer(feed, share_inputs=True)
        found = _outputs(request, outputs)
        self._idle.append(request)
        return found


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
