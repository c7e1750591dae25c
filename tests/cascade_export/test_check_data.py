"""The texts that members are checked on: how their file is read, and which of them are labelled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cascade_export.check import load_check_data

from cascade_rt.cli import main
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import InputError
from cascade_rt.io.readers import Reading

_CHECKPOINT: Any = SimpleNamespace(pair=False, labels=("neg", "pos"), task=SingleLabel(), validation=lambda most: [])


def test_columns_have_the_names_that_reading_gives_them(tmp_path: Path) -> None:
    file = tmp_path / "check.csv"
    file.write_text("review;sentiment\na good film;pos\na bad film;neg\n")
    found = load_check_data(file, _CHECKPOINT, Reading(columns=("review",), label_column="sentiment"))
    assert found is not None
    assert found.texts == ["a good film", "a bad film"]
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0]
    found = load_check_data(file, _CHECKPOINT, Reading(columns=("review",)))
    assert found is not None
    assert found.labels is None
    with pytest.raises(InputError, match="no column 'mood'; found 'review', 'sentiment'"):
        load_check_data(file, _CHECKPOINT, Reading(columns=("review",), label_column="mood"))
    assert load_check_data(None, _CHECKPOINT, Reading(columns=("review",))) is None


def test_the_command_takes_the_columns_and_says_where_no_label_was_found(
    member_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("check.csv").write_text("review\tmood\na good film\tgood\na bad film\tbad\n")
    export = ["export", "--member", str(member_folders[0]), "--output", "out", "--check-data", "check.csv"]
    assert main(export) == 2
    assert "found the columns 'review', 'mood', expected a text" in capsys.readouterr().err
    assert main([*export, "--text-column", "review"]) == 0
    assert "check.csv has no column 'label'; --label-column names another" in capsys.readouterr().out
    assert main([*export, "--text-column", "review", "--label-column", "mood", "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "--label-column" not in shown
