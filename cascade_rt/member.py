"""One member: an ONNX Runtime session with an explicit provider and number of threads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .bundle import MemberEntry, file_version
from .errors import BundleError, CascadeError, InputError

_SPIN_MICROSECONDS = "500"
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_SHORT_NAMES = {"cpu": _CPU, "cuda": _CUDA}
_FIXED_OPTIONS = {_CUDA: {"arena_extend_strategy": "kSameAsRequested"}}  # the default doubles the arena as it grows
_NO_KERNELS = {_CUDA: {"int8", "int8-tensor", "int8-static"}}  # their matrix products would run on the CPU, in silence
_PRODUCTS = {"Attention", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention", "QAttention"}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Member:
    """A complete classifier; its session is made when a text first needs it."""

    def __init__(
        self,
        entry: MemberEntry,
        path: Path,
        labels: int,
        provider: str,
        threads: int,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to run the ONNX file at `path` by `provider`, one of ONNX Runtime's names, with `threads`.

        Raises InputError for a precision that the provider has no kernels for.
        """
        if entry.precision in _NO_KERNELS.get(provider, ()):
            raise InputError(
                f"member {entry.name!r} is in {entry.precision}, whose products {provider} cannot run; use the "
                "provider cpu, or export it again with --precision fp16"
            )
        self.entry = entry
        self._path = path
        self._labels = labels
        self._provider = provider
        self._version = file_version(path)
        self._provider_options = _FIXED_OPTIONS.get(provider, {}) | dict(provider_options or {})
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
            if self._provider == _CPU:
                logits = session.run(self._outputs, {name: batch[name] for name in self._inputs})[0]
            else:
                logits = self._run_bound(session, batch)
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
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def _run_bound(self, session: Any, batch: dict[str, NDArray[np.int64]]) -> NDArray[Any]:
        """Run with inputs and output bound, so that the logits are all that comes back from the device."""
        binding = session.io_binding()
        for name in self._inputs:
            binding.bind_cpu_input(name, batch[name])
        binding.bind_output(self._outputs[0])
        session.run_with_iobinding(binding)
        logits: NDArray[Any] = binding.copy_outputs_to_cpu()[0]
        return logits

    def _make_session(self) -> Any:
        if file_version(self._path) != self._version:
            raise BundleError(
                f"{self._path}: replaced since the bundle was opened; open it again (preload=True loads at once)"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads wait actively for the next operator (sleeping between operators costs up to a third), but not for
        # the default tens of milliseconds: an idle member would spin on the cores that the next member needs.
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        # On CPUs, ONNX Runtime's kernel for a fused addition and normalization is slower than those for its parts.
        disabled = ["SkipLayerNormFusion"] if self._provider == _CPU else []
        exact = self._provider == _CPU and self.entry.precision.startswith("int8") and int8_saturates()
        if exact:  # slower kernels, which do not
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self._provider != _CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(self._path),
                options,
                providers=[(self._provider, self._provider_options)],
                disabled_optimizers=disabled,
            )
        except Exception as error:  # ONNX Runtime's own classes share no public base
            remedy = "export again" + (" (this CPU has no VNNI: best in fp32)" if exact else "")
            raise BundleError(f"{self._path}: ONNX Runtime cannot load it ({_first_line(error)}); {remedy}") from None
        running = session.get_providers()[0]
        if running != self._provider:
            raise CascadeError(
                f"asked for the provider {self._provider}, but {running} runs; check its drivers and libraries"
            )
        if on_cpu := self._products_on_cpu(session):
            raise CascadeError(
                f"asked for the provider {self._provider}, but of member {self.entry.name!r} it runs no "
                f"{', '.join(sorted(on_cpu))}: they would fall to the CPU; use the provider cpu, or another precision"
            )
        self._inputs = [node.name for node in session.get_inputs()]
        if not {"input_ids"} <= set(self._inputs) <= set(_INPUTS):
            raise BundleError(
                f"{self._path}: takes the inputs {', '.join(self._inputs)}; expected input_ids and, of the others, "
                f"{' and '.join(_INPUTS[1:])} only"
            )
        outputs = [node.name for node in session.get_outputs()]
        self._outputs = ["logits"] if "logits" in outputs else outputs[:1]
        return session

    def _products_on_cpu(self, session: Any) -> set[str]:
        """Return the kinds of matrix products that another provider left to the CPU; small operators may be there.

        ONNX Runtime tells since 1.24; of older ones only what `get_providers` says is known.
        """
        if self._provider == _CPU or not hasattr(session, "get_provider_graph_assignment_info"):
            return set()
        parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == _CPU]
        operators = {node.op_type for part in parts for node in part.get_nodes()}
        return {name for name in operators if name in _PRODUCTS or name.startswith(("MatMul", "DynamicQuantizeMatMul"))}


# One MatMulInteger of unsigned by signed bytes, as an ONNX file.
_PRODUCT = (
    b'\x08\x07\x12\x00:G\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\nsaturation'
    b"Z\t\n\x01a\x12\x04\n\x02\x08\x02Z\t\n\x01b\x12\x04\n\x02\x08\x03b\t\n\x01c\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\r"
)


@cache
def int8_saturates() -> bool:
    """Whether products of bytes come out wrong on this CPU: those without VNNI add pairs of them in 16 bits.

    Found by multiplying the largest bytes, not by the CPU's name.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(_PRODUCT, options, providers=[_CPU])
    rows, columns = np.full((4, 64), 255, dtype=np.uint8), np.full((64, 16), 127, dtype=np.int8)
    return bool(np.any(session.run(None, {"a": rows, "b": columns})[0] != 64 * 255 * 127))


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
