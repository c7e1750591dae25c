"""The precisions of members: the needs of each, and the engines that cannot run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import BundleError


@dataclass(frozen=True)
class Precision:
    """The number format of a member's weights and products."""

    name: str
    products_of_bytes: bool = False
    """ONNX Runtime multiplies uint8 by int8, of which x86 CPUs without VNNI add pairs in 16 bits."""
    weight_bits: int = 8
    """Bits of the weights of such products that the export writes now; with 7, the sums of pairs fit."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Providers without kernels for it, each with the precision to export for it."""
    batch_invariant: bool = True
    """An answer is independent of the other texts of its batch."""
    since: tuple[int, int] = (1, 20)
    """The first version of ONNX Runtime that has kernels for it."""


# CUDA would silently leave products of bytes to the CPU.
_DYNAMIC = {"cuda": "fp16", "openvino": "int8-static"}
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32"),
        Precision("fp16"),
        Precision("fp32-int8-words"),  # but for the table of the words
        Precision("fp16-int8-words"),
        Precision("int8", products_of_bytes=True, weight_bits=7, instead=_DYNAMIC),
        Precision("int8-vnni", products_of_bytes=True, instead=_DYNAMIC),
        Precision("int8-tensor", products_of_bytes=True, instead=_DYNAMIC, batch_invariant=False),
        Precision("int8-blocks", since=(1, 22)),
        Precision("int8-static", products_of_bytes=True, instead={"cuda": "fp16"}),
        Precision("int8-weights", since=(1, 23)),
        Precision("int8-table", instead={"cuda": "fp16"}),  # of averaging networks; products are with 0 and 1 alone
    )
}
"""All precisions by name."""


def known_precision(name: str, where: str) -> str:
    """Return the name of a precision; raise BundleError, which begins with `where`, for an unknown one."""
    if name not in PRECISIONS:
        raise BundleError(
            f"{where}: precision: found {name[:80]!r}, this cascade-rt knows {', '.join(PRECISIONS)}; "
            "install a newer cascade-rt"
        )
    return name
