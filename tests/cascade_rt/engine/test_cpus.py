"""Container limits, read from made-up /proc and /sys trees in both layouts."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.engine import cpus
from cascade_rt.errors import InvalidOption


def tree(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "max 100000"}, None),
        (  # the tightest of a group and those above it
            {
                "proc/self/cgroup": "0::/pod/box",
                "cgroup/cpu.max": "max 100000",
                "cgroup/pod/cpu.max": "200000 100000",
                "cgroup/pod/box/cpu.max": "400000 100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n0::/",
                "cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (  # v1 in a container: the group's path is the host's, the files are at the mount's root
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc",
                "cgroup/cpu/cpu.cfs_quota_us": "50000",
                "cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/",
                "cgroup/cpu/cpu.cfs_quota_us": "-1",
                "cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_quota_of_both_layouts(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpus.cgroup_quota(*tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (8.0, 4), (2.9, 2), (0.5, 1)])
def test_usable_cpus_are_whole_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: quota)
    assert cpus.usable_threads(None) == expected
    assert cpus.usable_threads(7) == 7, "what was asked for is what runs"


@given(st.sets(st.integers(0, 200), min_size=1, max_size=40), st.data())
def test_shares_divide_the_cpus_evenly(affinity: set[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(affinity)))
    with (
        mock.patch("os.sched_getaffinity", lambda _: affinity),
        mock.patch.object(cpus, "cgroup_quota", lambda: None),
    ):
        shares = cpus.cpu_shares(count)
        with pytest.raises(InvalidOption, match="workers"):
            cpus.cpu_shares(len(affinity) + 1)
    assert sorted(cpu for share in shares for cpu in share) == sorted(affinity)
    assert len(shares) == count
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_hyperthreads_of_a_core_share_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {f"cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: None)
    assert cpus.cpu_shares(4, tmp_path) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_no_more_shares_than_the_quota_has_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: 2.5)
    assert [len(share) for share in cpus.cpu_shares(2)] == [4, 4]
    with pytest.raises(InvalidOption, match="from 1 to 2"):
        cpus.cpu_shares(3)
