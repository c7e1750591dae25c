"""One member: an ONNX Runtime session with an explicit provider and number of threads."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .bundle import MemberEntry
from .errors import BundleError, CascadeError, InputError

_SPIN_MICROSECONDS = "500"
_SHORT_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Member:
    """A complete classifier; its session is made when a text first needs it."""

    def __init__(self, entry: MemberEntry, path: Path, labels: int, provider: str, threads: int) -> None:
        """Prepare to run the ONNX file at `path` by `provider`, one of ONNX Runtime's names, with `threads`."""
        self.entry = entry
        self._path = path
        self._labels = labels
        self._provider = provider
        self._threads = threads
        self.session: Any = None
        self._loading = Lock()

    def load(self) -> Any:
        """Return the session, made now if it was not; raise BundleError where ONNX Runtime cannot use the file."""
        if self.session is None:
            with self._loading:
                if self.session is None:
                    self.session = self._make_session()
        return self.session

    def run(self, batch: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the logits, float32 of shape (rows, labels), of a padded micro-batch of shape (rows, tokens)."""
        session = self.load()
        logits: NDArray[np.float32]
        try:
            logits = session.run(None, {name: batch[name] for name in self._inputs})[0]
        except Exception as error:
            raise BundleError(
                f"member {self.entry.name!r} failed to run ({_first_line(error)}); export again"
            ) from None
        expected = (len(batch["input_ids"]), self._labels)
        if logits.shape != expected:
            raise BundleError(
                f"member {self.entry.name!r} answered logits of shape {logits.shape}, expected {expected}; export again"
            )
        if not math.isfinite(np.vdot(logits, logits)):  # one call; any NaN or infinity shows in the sum of squares
            raise BundleError(
                f"member {self.entry.name!r} answered NaN or infinity; check the model, then export again"
            )
        return logits

    def _make_session(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads wait actively for the next operator (sleeping between operators costs up to a third), but not for
        # the default tens of milliseconds: an idle member would spin on the cores that the next member needs.
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        try:
            session = onnxruntime.InferenceSession(str(self._path), options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise BundleError(
                f"{self._path}: ONNX Runtime cannot load it ({_first_line(error)}); export again"
            ) from None
        running = session.get_providers()[0]
        if running != self._provider:
            raise CascadeError(
                f"asked for the provider {self._provider}, but {running} runs; check its drivers and libraries"
            )
        self._inputs = [node.name for node in session.get_inputs()]
        return session


def provider_name(provider: str) -> str:
    """Return ONNX Runtime's name for a provider ("cpu", "cuda" or its own name), if it is installed."""
    wanted = _SHORT_NAMES.get(provider.lower(), provider)
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        remedy = (
            "pip install onnxruntime-gpu" if "cuda" in wanted.lower() else "install the onnxruntime build that has it"
        )
        raise InputError(f"provider {provider!r} is not available; found {', '.join(available)}; {remedy}")
    return wanted


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
