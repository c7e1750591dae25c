"""The offline stage connects to nothing either, and writes what was asked for alone."""

from __future__ import annotations

import sys
from pathlib import Path

from ..cascade_rt.test_privacy import watched

_COMMANDS = """
import sys
from cascade_rt.cli import main
train = "train --train-file data.csv --base {base} --layers 1 --max-length 16 --epochs 1 --output tiny"
export = "export --member tiny --output bundle --max-accuracy-drop 100"
sys.exit(main(train.split()) or main(export.split()))
"""


def test_train_and_export_write_their_folders_alone(member_folders: list[Path], tmp_path: Path) -> None:
    """The training tries the export first, with files in the temporary folder, which are removed."""
    rows = [f"a film {row},{'good' if row % 2 else 'bad'}" for row in range(40)]
    Path("data.csv").write_text("\n".join(["text,label", *rows]))
    Path("main.py").write_text(_COMMANDS.format(base=member_folders[1]))
    connections, written = watched([sys.executable, "main.py"], tmp_path / "home")
    assert connections == []
    assert {path for path in written if Path(path).is_absolute() and not path.startswith(f"{tmp_path}/")} == set()
    assert [*(tmp_path / "home").iterdir(), *(tmp_path / "temporary").iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["bundle", "home", "temporary", "tiny"]
