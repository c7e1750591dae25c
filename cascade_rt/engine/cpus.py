"""Which CPUs this process may use, and how many: its affinity and the quota of its control group, v1 or v2."""

from __future__ import annotations

import os
import re
from numbers import Integral
from pathlib import Path, PurePosixPath

from ..errors import InvalidOption

_LONGEST_SPIN = 1_000_000  # microseconds
_MOST_THREADS = 1024


def usable_threads(threads: int | None) -> int:
    """Return `threads`, or for None the number of CPUs that this process may use; raise InvalidOption if invalid."""
    if threads is None:
        return usable_cpus()
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= threads <= _MOST_THREADS:
        raise InvalidOption("threads", threads, f"a whole number from 1 to {_MOST_THREADS}")
    return int(threads)


def spin_duration(spin_us: int | None) -> int | None:
    """Return `spin_us`; raise InvalidOption if it is invalid."""
    if spin_us is None:
        return None
    if isinstance(spin_us, bool) or not isinstance(spin_us, Integral) or not 0 <= spin_us <= _LONGEST_SPIN:
        raise InvalidOption("spin_us", spin_us, f"a whole number from 0 to {_LONGEST_SPIN}, or None")
    return int(spin_us)


def usable_cpus() -> int:
    """Return the number of CPUs in the process's affinity, at most its control group's quota rounded down; at least 1.

    With more threads than the quota allows, all of them are stopped until the next period once it is used up.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_shares(count: int, topology: Path = Path("/sys/devices/system/cpu")) -> list[list[int]]:
    """Divide the CPUs of the process's affinity into `count` shares; as far as possible, a core's CPUs share one.

    Raises InvalidOption for more shares than usable CPUs.
    """
    most = usable_cpus()
    if not 1 <= count <= most:
        raise InvalidOption("workers", count, f"a whole number from 1 to {most}, the CPUs that may be used")

    def core(cpu: int) -> tuple[int, int]:
        siblings = re.match(r"\d+", text_of(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"))
        return int(siblings[0]) if siblings else cpu, cpu

    cpus = sorted(os.sched_getaffinity(0), key=core)
    return [cpus[len(cpus) * at // count : len(cpus) * (at + 1) // count] for at in range(count)]


def cgroup_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the tightest CPU quota, in CPUs, of the process's control group and those above it; None for none."""
    quotas = [
        _quota_v2(folder) if version == 2 else _quota_v1(folder) for folder, version in groups_of("cpu", proc, cgroups)
    ]
    return min((quota for quota in quotas if quota is not None), default=None)


def groups_of(controller: str, proc: Path, cgroups: Path) -> list[tuple[Path, int]]:
    """Return the folders of the process's control groups for a controller, and of those above them, with the version.

    `proc` and `cgroups`: where the system shows processes and control groups.
    """
    found = []
    for line in text_of(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one hierarchy for all controllers
            found += [(folder, 2) for folder in _up_from(cgroups, path)]
        elif controller in controllers.split(","):
            found += [(folder, 1) for name in (controllers, controller) for folder in _up_from(cgroups / name, path)]
    return found


def _up_from(root: Path, path: str) -> list[Path]:
    """Return the group's folder and all folders above it; inside a container only the root may exist."""
    below = PurePosixPath(path.lstrip("/"))
    return [root / part for part in (below, *below.parents)]


def _quota_v2(folder: Path) -> float | None:
    words = text_of(folder / "cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def text_of(path: Path) -> str:
    """Return a file's content without spaces around it; nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
