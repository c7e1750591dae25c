"""Members run by OpenVINO in place of ONNX Runtime, from the same ONNX files."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from ..errors import first_line
from .forks import never_destroy

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
        settings = {"PERFORMANCE_HINT": hint, **_SETTINGS, "INFERENCE_NUM_THREADS": threads, **options}
        core = _core(os.getpid())
        if options:
            _check(options)
        model = core.read_model(path)
        self._compiled = core.compile_model(model, "CPU", settings)
        self._idle: list[Any] = []
        self.inputs: list[str] = [port.get_any_name() for port in model.inputs]
        self.outputs: list[str] = [port.get_any_name() for port in model.outputs]

    def run(self, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        """Run one micro-batch."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer(feed, share_inputs=True)
        found = _outputs(request, outputs)
        self._idle.append(request)
        return found


@cache
def _core(process: int) -> Any:
    """Return the core of a process, made when it is first needed and never destroyed.

    A core replaces the signal stack of the thread that makes it, and puts the one before back when it is destroyed. Two
    that are not destroyed in reverse order leave a stack that is gone, and the next signal ends the process.
    """
    core = load_openvino().Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # only now is the plugin loaded, which does that
    never_destroy(core)
    return core


def _check(options: Mapping[str, str]) -> None:
    """Raise ValueError for a property that OpenVINO does not have; on another core, since it would keep them."""
    core = load_openvino().Core()
    try:
        core.set_property("CPU", dict(options))
        core.get_property("CPU", "FULL_DEVICE_NAME")  # only now are the options read
    except RuntimeError as error:
        raise ValueError(f"properties of OpenVINO for CPUs ({first_line(error)})") from error


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
