"""Engines that can execute members: the execution providers of ONNX Runtime, and OpenVINO. And what each cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..bundle import Bundle, MemberEntry
from ..bundle.onnx_file import scan
from ..bundle.precisions import PRECISIONS
from ..errors import BundleError, InvalidOption

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
OPENVINO = "openvino"
"""The package of that name, not ONNX Runtime's provider, which is a build of its own."""

_SHORT_NAMES = {"cpu": CPU, "cuda": CUDA}
_ON_CPU = {CPU, "DnnlExecutionProvider", "OpenVINOExecutionProvider", "XnnpackExecutionProvider"}
_FIXED_OPTIONS = {CUDA: {"arena_extend_strategy": "kSameAsRequested"}}  # the default doubles the arena as it grows
_EXACT_SINCE = (1, 30)
_EXACT_BITS = 7  # of weights, so that two products of them with 255 fit into 16 bits
_PRODUCTS = {"Attention", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention", "QAttention"}

# One MatMulInteger of unsigned by signed bytes, as an ONNX file.
_PRODUCT = (
    b'\x08\x07\x12\x00:G\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\nsaturation'
    b"Z\t\n\x01a\x12\x04\n\x02\x08\x02Z\t\n\x01b\x12\x04\n\x02\x08\x03b\t\n\x01c\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\r"
)


def provider_name(provider: str) -> str:
    """Return ONNX Runtime's name of a provider, or `OPENVINO`; raise InvalidOption if it is not installed."""
    if not isinstance(provider, str):
        raise InvalidOption("provider", provider, "a name: cpu, cuda or one of ONNX Runtime's")
    if provider.lower() == OPENVINO:
        if not is_installed(OPENVINO):
            raise InvalidOption("provider", provider, "one that is installed; pip install 'cascade-rt[openvino]'")
        return OPENVINO
    wanted = _SHORT_NAMES.get(provider.lower(), provider)
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        remedy = (
            "pip install onnxruntime-gpu" if "cuda" in wanted.lower() else "install the onnxruntime build that has it"
        )
        raise InvalidOption("provider", provider, f"one that is available: {', '.join(available)}; {remedy}")
    return wanted


def needs_gpu(provider: str) -> bool:
    """Return whether a cluster reserves a GPU for what runs on a provider; raise InvalidOption for an unknown name.

    Which providers are installed is known on the machines that run members.
    """
    name = provider.lower()
    if name not in (*_SHORT_NAMES, OPENVINO) and not provider.endswith("ExecutionProvider"):
        raise InvalidOption("provider", provider, "cpu, cuda, openvino or ONNX Runtime's name of a provider")
    return name not in ("cpu", OPENVINO) and provider not in _ON_CPU


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return find_spec(package) is not None


def instead_of(precision: str, provider: str) -> str | None:
    """Return the precision to export where the provider has no kernels for one; None where it has them."""
    by_name = {_SHORT_NAMES.get(name, name): instead for name, instead in PRECISIONS[precision].instead.items()}
    return by_name.get(provider)


def check_precision(name: str, precision: str, provider: str) -> None:
    """Raise InvalidOption if the provider has no kernels for the member's precision, BundleError if all are too old."""
    since = PRECISIONS[precision].since
    if provider != OPENVINO and installed_version() < since:
        raise BundleError(
            f"member {name!r}: found onnxruntime {onnxruntime.__version__}, which cannot run {precision}; install "
            f"onnxruntime {'.'.join(map(str, since))} or newer, or export the member again in int8 or fp32"
        )
    if instead := instead_of(precision, provider):
        raise InvalidOption(
            "provider",
            provider,
            f"one that can run the {precision} products of member {name!r}; use the provider cpu, or export the member "
            f"again in the precision {instead}",
        )


def options_for(provider: str, options: Mapping[str, str] | None) -> dict[str, str]:
    """Return the options to hand to a provider: ours, then the user's."""
    return _FIXED_OPTIONS.get(provider, {}) | {name: str(value) for name, value in (options or {}).items()}


def products_on_cpu(session: Any, provider: str) -> set[str]:
    """Return the kinds of matrix products that another provider left to the CPU; small operators may run there.

    ONNX Runtime reports this since 1.24; for older versions the answer is empty.
    """
    if provider == CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return set()
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    operators = {node.op_type for part in parts for node in part.get_nodes()}
    return {name for name in operators if name in _PRODUCTS or name.startswith(("MatMul", "DynamicQuantizeMatMul"))}


def installed_version() -> tuple[int, ...]:
    """Return ONNX Runtime's version: its first two numbers."""
    return tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def saturates(entry: MemberEntry) -> bool:
    """Return whether ONNX Runtime's default kernels compute a member wrongly on this CPU."""
    return PRECISIONS[entry.precision].products_of_bytes and entry.weight_bits > _EXACT_BITS and int8_saturates()


def on_exact_kernels(bundle: Bundle, provider: str = CPU) -> tuple[str, ...]:
    """Return the names of the members whose products run on ONNX Runtime's exact kernels with this provider."""
    if _SHORT_NAMES.get(provider.lower(), provider) != CPU:
        return ()
    return tuple(entry.name for entry in bundle.members if saturates(entry))


def check_exact_kernels(path: Path) -> None:
    """Raise BundleError for an int8 file on which ONNX Runtime's exact kernels for CPUs without VNNI fail.

    Before 1.30 they end the process, or answer wrongly, where products have no zero point of the weights.
    """
    if installed_version() < _EXACT_SINCE and scan(path).without_zero_point:
        raise BundleError(
            f"{path}: found a CPU without VNNI and onnxruntime {onnxruntime.__version__}, which cannot run the int8 "
            "products of this file there; export the member again in int8 or fp32, or install onnxruntime 1.30 or newer"
        )


@cache
def int8_saturates() -> bool:
    """Return whether products of bytes are wrong on this CPU: without VNNI, pairs of them are added in 16 bits.

    Found by multiplying the largest bytes, not by the CPU's name.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(_PRODUCT, options, providers=[CPU])
    rows, columns = np.full((4, 64), 255, dtype=np.uint8), np.full((64, 16), 127, dtype=np.int8)
    return bool(np.any(session.run(None, {"a": rows, "b": columns})[0] != 64 * 255 * 127))
