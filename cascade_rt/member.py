"""One member: an ONNX Runtime session with an explicit provider and number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .bundle import MemberEntry
from .errors import BundleError, CascadeError, InputError

_SHORT_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Member:
    """A complete classifier, ready to run."""

    def __init__(self, entry: MemberEntry, path: Path, labels: int, provider: str, threads: int) -> None:
        """Open a session on `path`; raise BundleError where ONNX Runtime cannot use the file."""
        self.entry = entry
        self._labels = labels
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = provider_name(provider)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise BundleError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)}); export again") from None
        running = self.session.get_providers()[0]
        if running != wanted:
            raise CascadeError(f"asked for the provider {wanted}, but {running} runs; check its drivers and libraries")
        self._inputs = [node.name for node in self.session.get_inputs()]

    def run(self, batch: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the logits, float32 of shape (rows, labels), of a padded micro-batch of shape (rows, tokens)."""
        logits: NDArray[np.float32]
        try:
            logits = self.session.run(None, {name: batch[name] for name in self._inputs})[0]
        except Exception as error:
            raise BundleError(
                f"member {self.entry.name!r} failed to run ({_first_line(error)}); export again"
            ) from None
        expected = (len(batch["input_ids"]), self._labels)
        if logits.shape != expected:
            raise BundleError(
                f"member {self.entry.name!r} answered logits of shape {logits.shape}, expected {expected}; export again"
            )
        if not np.isfinite(logits).all():
            raise BundleError(
                f"member {self.entry.name!r} answered NaN or infinity; check the model, then export again"
            )
        return logits


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


def usable_threads(threads: int | None) -> int:
    """Return `threads`, or the number of CPUs that this process may run on."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise InputError(f"found {threads} threads, expected at least 1, or none for all usable CPUs")
    return threads


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
