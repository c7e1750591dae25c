"""Output for people has no escape sequences from files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.cli import main
from cascade_rt.cli.rendering import printable

HOSTILE = ["\x1b[2Jgone", "\x9b31mred", "right\u202eleft"]


@given(st.text())
def test_printable_text_has_no_control_characters_and_loses_nothing(text: str) -> None:
    found = printable(text)
    assert all(letter.isprintable() or letter == "\n" for letter in found)
    if text.isprintable():
        assert found == text
    assert printable(text, keep="").count("\n") == 0


@pytest.fixture
def hostile(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose labels and first member's name are escape sequences."""
    folder = shutil.copytree(bundle, tmp_path / "hostile")
    manifest: dict[str, Any] = json.loads((folder / "cascade.json").read_text("utf-8"))
    manifest.pop("sha256", None)
    manifest["labels"] = HOSTILE
    manifest["members"][0]["name"] = "tiny\x1b]0;title\x07"
    (folder / "cascade.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "info --model-dir BUNDLE",
        "evaluate --model-dir BUNDLE --input labelled.jsonl",
        "tune --model-dir BUNDLE --input labelled.jsonl --speedup 1.1 --dry-run --no-cache",
        "push --model-dir BUNDLE --dry-run a/b",
        "evaluate --model-dir BUNDLE --input wrong.jsonl",
        "predict --model-dir BUNDLE --input \x1b[2J.txt",
        "predict --model-dir BUNDLE --input texts.txt --output out.jsonl",
    ],
)
def test_no_command_prints_an_escape_sequence(hostile: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"text": f"word {place}", "label": HOSTILE[place % 3]}) + "\n" for place in range(60)]
    Path("labelled.jsonl").write_text("".join(rows))
    Path("wrong.jsonl").write_text(json.dumps({"text": "a", "label": "\x1b[31m"}) + "\n")
    Path("texts.txt").write_text("a film\n")
    status = main([word.replace("BUNDLE", str(hostile)) for word in command.split(" ")])
    out, error = capsys.readouterr()
    assert status == (2 if "wrong" in command or "[2J" in command else 0), error
    for letter in "\x1b\x9b\u202e\x07":
        assert letter not in out + error
