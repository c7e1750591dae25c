"""The model card, made from the manifest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_rt import read_bundle
from cascade_rt.bundle.card import model_card
from cascade_rt.cli import main


def test_the_card_shows_members_thresholds_and_use(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--model-dir", str(bundle), "--dry-run", "team/commands"]) == 0
    card = capsys.readouterr().out
    for shown in ("library_name: cascade-rt", "| small | 2 | 32 |", "0.8000", "always answers", "bad, fine, good"):
        assert shown in card
    assert 'CascadeRuntime("hf:team/commands")' in card
    assert main(["push", "--model-dir", str(bundle), "no-slash"]) == 2
    assert "expected org/name" in capsys.readouterr().err


def test_the_card_of_segments_shows_their_exit_rule(four_segments: Path) -> None:
    card = model_card(read_bundle(four_segments), "team/segments")
    assert "patience" in card
    assert "whose confidence exceeds its threshold" not in card
    assert card.count("always answers") == 1, "only the last member does"
