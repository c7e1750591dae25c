"""A description of the machine that a figure comes from; every file under benchmarks/results/ has one."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("cascade-rt", "numpy", "onnxruntime", "tokenizers", "torch", "transformers", "optimum-onnx", "openvino")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "sve", "i8mm", "bf16", "sve2", "sme")
_PARTS = {
    "0x41": {  # ARM
        "0xd03": "Cortex-A53",
        "0xd04": "Cortex-A35",
        "0xd05": "Cortex-A55",
        "0xd07": "Cortex-A57",
        "0xd08": "Cortex-A72",
        "0xd09": "Cortex-A73",
        "0xd0a": "Cortex-A75",
        "0xd0b": "Cortex-A76",
        "0xd0c": "Neoverse-N1",
        "0xd0d": "Cortex-A77",
        "0xd40": "Neoverse-V1",
        "0xd41": "Cortex-A78",
        "0xd42": "Cortex-A78AE",
        "0xd44": "Cortex-X1",
        "0xd46": "Cortex-A510",
        "0xd47": "Cortex-A710",
        "0xd48": "Cortex-X2",
        "0xd49": "Neoverse-N2",
        "0xd4a": "Neoverse-E1",
        "0xd4b": "Cortex-A78C",
        "0xd4d": "Cortex-A715",
        "0xd4e": "Cortex-X3",
        "0xd4f": "Neoverse-V2",
        "0xd80": "Cortex-A520",
        "0xd81": "Cortex-A720",
        "0xd82": "Cortex-X4",
        "0xd84": "Neoverse-V3",
        "0xd85": "Cortex-X925",
        "0xd87": "Cortex-A725",
        "0xd8e": "Neoverse-N3",
    },
    "0x46": {"0x001": "Fujitsu A64FX"},
    "0x48": {"0xd01": "Kunpeng-920"},
    "0x4e": {"0x004": "NVIDIA Carmel"},
    "0x51": {"0x001": "Qualcomm Oryon"},
    "0x61": {"0x022": "Apple M1", "0x023": "Apple M1", "0x032": "Apple M2", "0x033": "Apple M2"},
    "0x6d": {"0xd49": "Azure Cobalt 100"},
    "0xc0": {"0xac3": "Ampere-1", "0xac4": "Ampere-1a"},
}
_ARM = {(implementer, part): name for implementer, parts in _PARTS.items() for part, name in parts.items()}


def describe() -> dict[str, Any]:
    """Return the processor, its usable cores, the memory, the system, and the versions of the packages that compute."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": packages,
    }


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    return name_processor(info.read_text() if info.is_file() else "") or platform.processor() or "unknown"


def name_processor(cpuinfo: str) -> str:
    """Return the processor's name in the text of /proc/cpuinfo, and which instructions it has that matter for speed.

    x86 CPUs have a name there. ARM CPUs have codes; kinds of cores on one chip are joined: "Cortex-A55 + Cortex-A76".
    Without either, the name is empty.
    """
    lines = [line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line]
    pairs = [(key.strip(), value.strip()) for key, value in lines]
    fields = dict(pairs)
    kinds, implementer = [], ""
    for key, value in pairs:  # of each core
        if key == "CPU implementer":
            implementer = value.lower()
        elif key == "CPU part":
            kinds.append(_ARM.get((implementer, value.lower()), f"ARM {implementer}/{value.lower()}"))
    name = " + ".join(dict.fromkeys(kinds)) or fields.get("model name", "")
    flags = set((fields.get("flags", "") + " " + fields.get("Features", "")).split())
    known = [flag for flag in _FLAGS if flag in flags]
    return f"{name} ({' '.join(known)})" if name and known else name
