"""Memory: what a bundle needs, roughly, and what there is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from .cpus import groups_of, text_of

PROCESS = 75 * 2**20
"""Bytes of Python, numpy, ONNX Runtime and a tokenizer."""
_BULK = 30 * 2**20  # activations of many texts, for each thread


@dataclass(frozen=True)
class Needed:
    """Bytes of resident memory of one process, as measured to about a tenth where members are prepared or mapped."""

    first: int
    """For texts that leave at the first member."""
    all: int
    """For texts that run all members, one at a time."""
    bulk: int
    """For many texts at a time, on one thread."""


def needed_memory(bundle: Bundle) -> Needed:
    """Return what a bundle needs: weights that texts read, which are all but those of most words, and the process."""
    folder = bundle.folder or Path()
    tokens = len(json.loads((folder / bundle.tokenizer_file).read_text("utf-8"))["model"]["vocab"])
    read = []
    for member in bundle.members:
        of_words = min(1.0, tokens * member.hidden_size / member.parameters) if member.layers else 1.0
        read.append(int(member.size(folder / member.file) * (1 - of_words)))
    return Needed(PROCESS + read[0], PROCESS + sum(read), PROCESS + sum(read) + _BULK)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this process may still take: the machine's, or less by its control groups; None if unknown.

    Reads versions 1 and 2 of control groups. Pages of files count as free, since they can be dropped.
    """
    found = []
    fields = dict(line.split(":", 1) for line in text_of(proc / "meminfo").splitlines() if ":" in line)
    if "MemAvailable" in fields:
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    for folder, version in groups_of("memory", proc, cgroups):
        limit = text_of(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = text_of(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        stat = dict(line.split() for line in text_of(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        if limit.isdigit() and used.isdigit():
            files = int(stat.get("file" if version == 2 else "cache", 0))
            found.append(max(0, int(limit) - max(0, int(used) - files)))
    return min(found, default=None)
