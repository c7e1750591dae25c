"""Memory that a bundle needs, and that the machine or a control group leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_rt import read_bundle
from cascade_rt.cli import main
from cascade_rt.engine.memory import PROCESS, available_memory, needed_memory

from .test_cpus import tree

INFO = "MemTotal: 4000 kB\nMemAvailable: 3000 kB"


@pytest.mark.parametrize(
    ("files", "kilobytes"),
    [
        ({"proc/meminfo": INFO}, 3000),
        (
            {
                "proc/meminfo": INFO,
                "proc/self/cgroup": "0::/pod/box",
                "cgroup/pod/memory.max": "2048000",
                "cgroup/pod/memory.current": "1024000",
                "cgroup/pod/memory.stat": "anon 512000\nfile 512000",
                "cgroup/pod/box/memory.max": "max",
                "cgroup/pod/box/memory.current": "1024000",
            },
            1500,  # pages of files can be dropped
        ),
        (
            {
                "proc/meminfo": INFO,
                "proc/self/cgroup": "4:memory:/box",
                "cgroup/memory/box/memory.limit_in_bytes": "1024000",
                "cgroup/memory/box/memory.usage_in_bytes": "2048000",
            },
            0,
        ),
    ],
)
def test_what_is_left(tmp_path: Path, files: dict[str, str], kilobytes: int) -> None:
    assert available_memory(*tree(tmp_path, files)) == kilobytes * 1024


def test_what_a_bundle_needs_and_a_warning_where_there_is_less(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = needed_memory(read_bundle(bundle))
    assert PROCESS < found.first < found.all < found.bulk
    assert main(["info", "--model-dir", str(bundle)]) == 0
    assert "memory about 79 MB for texts that leave at tiny, 79 MB for all members" in capsys.readouterr().out
    monkeypatch.setattr("cascade_rt.cli.rendering.available_memory", lambda: 50_000_000)
    assert main(["predict", "--model-dir", str(bundle), "a film"]) == 0
    shown = capsys.readouterr()
    assert "this process may take 50 MB here, and all members need about 79 MB; use fewer members" in shown.err
    assert shown.out.startswith('{"label"')
