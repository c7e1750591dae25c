"""The settings of execution that were measured to be fastest on this machine, kept beside a bundle's files.

The file is no part of the bundle: its hash does not cover it, and another machine, another version of ONNX Runtime or
another bundle does not follow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import read_manifest
from ..errors import BundleError
from ..io.writers import write_json
from .cpus import usable_cpus
from .execution import Execution
from .prepared import machine

FILE = "machine.json"


def followed(model_dir: str | Path, execution: Execution) -> Execution:
    """Return the settings that were measured for a bundle on this machine, where none of them is given otherwise."""
    if execution.provider != "cpu" or execution.threads or execution.provider_options or execution.low_memory:
        return execution
    try:
        found = json.loads((Path(model_dir) / FILE).read_text("utf-8"))
        if found["machine"] != _here() or found["members"] != _members(read_manifest(Path(model_dir))):
            return execution
        spin_us = found.get("spin_us") if execution.spin_us is None else execution.spin_us
        return replace(execution, provider=str(found["provider"]), threads=int(found["threads"]), spin_us=spin_us)
    except (OSError, ValueError, KeyError, TypeError, BundleError):  # none, or not one of ours
        return execution


def keep(bundle: Bundle, execution: Execution, measured: Sequence[Mapping[str, Any]]) -> Path:
    """Write the settings that were fastest, with the measurements; return the file."""
    folder = bundle.folder or Path()
    record = {
        "machine": _here(),
        "members": _members(bundle),
        "provider": execution.provider,
        "threads": execution.threads,
        "spin_us": execution.spin_us,
        "measured": measured,
    }
    try:
        write_json(folder / FILE, record)
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be written ({error.strerror}); copy the bundle to a folder of your own"
        ) from error
    return folder / FILE


def _here() -> list[str]:
    return [*machine(), f"{usable_cpus()} CPUs"]


def _members(bundle: Bundle) -> list[str]:
    """Return the hashes of the members, which tuning does not change."""
    return [member.sha256 for member in bundle.members]
