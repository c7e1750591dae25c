"""The offline stage connects to nothing either, and writes its bundle alone."""

from __future__ import annotations

import sys
from pathlib import Path

from ..cascade_rt.test_privacy import watched

_EXPORT = """
from cascade_export.export import export_bundle
export_bundle([{member!r}], "bundle", max_accuracy_drop=100)
"""


def test_export_writes_its_bundle_alone(member_folders: list[Path], tmp_path: Path) -> None:
    Path("main.py").write_text(_EXPORT.format(member=str(member_folders[0])))
    connections, written = watched([sys.executable, "main.py"], tmp_path / "home")
    assert connections == []
    elsewhere = {path for path in written if Path(path).is_absolute() and not path.startswith(str(tmp_path))}
    assert {path for path in elsewhere if not path.startswith("/tmp/")} == set()
    assert list((tmp_path / "home").iterdir()) == []
