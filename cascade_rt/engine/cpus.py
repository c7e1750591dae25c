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
        siblings = re.match(r"\d+", _text(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"))
        return int(siblings[0]) if siblings else cpu, cpu

    cpus = sorted(os.sched_getaffinity(0), key=core)
    return [cpus[len(cpus) * at // count : len(cpus) * (at + 1) // count] for at in range(count)]


def cgroup_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the tightest CPU quota, in CPUs, of the process's control group and those above it; None for none."""
    quotas = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # v2: one hierarchy for all controllers
            quotas += [_quota_v2(folder) for folder in _up_from(cgroups, path)]
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):
                quotas += [_quota_v1(folder) for folder in _up_from(cgroups / name, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _up_from(root: Path, path: str) -> list[Path]:
    """Return the group's folder and all folders above it; inside a container only the root may exist."""
    below = PurePosixPath(path.lstrip("/"))
    return [root / part for part in (below, *below.parents)]


def _quota_v2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
