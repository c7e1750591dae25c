"""Show this machine's hardware and software, and what slows cascades down on it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime

from ..benchmark.machine import describe
from ..engine.cpus import cgroup_quota, usable_cpus
from ..engine.memory import available_memory
from ..engine.prepared import members_folder
from ..engine.providers import OPENVINO, int8_saturates, is_installed
from .parser import CommandParser
from .rendering import printable

_LITTLE_MEMORY = 500  # MB

SUMMARY = "show this machine's hardware and what slows it down"
EXAMPLE = "cascade-rt doctor"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> None:
    """Look, and print."""
    found = _found()
    advice = list(_advice(found))
    if options.json:
        print(json.dumps(found | {"advice": advice}, ensure_ascii=False))
        return
    there = found["memory_available_mb"]
    lines = {
        "system": found["system"],
        "packages": ", ".join(f"{name} {version}" for name, version in found["packages"].items()),
        "processor": found["processor"],
        "int8": "exact, fast kernels" if found["int8_kernels"] else "no VNNI: other kernels",
        "threads": f"{found['threads']} of {found['cpus']} CPUs",
        "memory": "unknown" if there is None else f"{there:,} MB available",
        "providers": ", ".join(found["providers"]),
        "member cache": found["kept_members"] or "none",
        "telemetry": "off" if found["telemetry_off"] else "may be on",
    }
    print(printable("\n".join(f"{name:13} {value}" for name, value in lines.items())))
    print()
    print(printable("\n".join(f"- {line}" for line in advice) or "found nothing that slows this machine down"))


def _found() -> dict[str, Any]:
    there, kept = available_memory(), members_folder(None)
    return describe() | {
        "cpus": os.cpu_count(),
        "threads": usable_cpus(),
        "quota": cgroup_quota(),
        "memory_available_mb": None if there is None else round(there / 1e6),
        "providers": [*onnxruntime.get_available_providers(), *([OPENVINO] if is_installed(OPENVINO) else [])],
        "int8_kernels": not int8_saturates(),
        "telemetry_off": os.environ.get("ORT_DISABLE_TELEMETRY") == "1",
        "kept_members": None if kept is None else str(kept),
        "kept_members_writable": kept is not None and _writable(kept),
    }


def _writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    return os.access(there, os.W_OK | os.X_OK)


def _advice(found: dict[str, Any]) -> Iterator[str]:
    if not found["int8_kernels"]:
        yield (
            "int8: without VNNI, members of older exports run on slower kernels, so export them again; "
            "cascade-rt export --precision auto measures whether fp32 is faster"
        )
    if found["quota"] is not None and found["quota"] < found["usable_cpus"]:
        yield f"threads: a control group allows {found['quota']:g} CPUs of {found['usable_cpus']}"
    if found["kept_members"] is not None and not found["kept_members_writable"]:
        yield (
            f"start: {found['kept_members']} cannot be written, so each process prepares members for this CPU again; "
            "set CASCADE_RT_CACHE to a folder that can"
        )
    if (there := found["memory_available_mb"]) is not None and there < _LITTLE_MEMORY:
        yield f"memory: {there} MB; cascade-rt info says what a bundle needs, and int8 members need a quarter of fp32"
    _, known, flags = found["processor"].rpartition(" (")
    if known and "torch" in found["packages"] and not {"bf16", "avx512_bf16", "amx_int8"} & set(flags[:-1].split()):
        yield "training: cascade-rt train --bf16 would be emulated on this CPU, several times slower than fp32"
    if not found["telemetry_off"]:
        yield "telemetry: ORT_DISABLE_TELEMETRY has another value than 1, so ONNX Runtime's may be on"
