"""Sessions whose weights are not packed: for processes that answer a few texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main

from ...toy import WORDS

TEXTS = [" ".join(WORDS[at : at + 1 + at % 7]) for at in range(30)]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each session that is made from now on, whether its weights are left as they are."""
    found: list[bool] = []
    make = onnxruntime.InferenceSession

    def spy(path: str, options: Any, **others: Any) -> Any:
        try:
            found.append(options.get_session_config_entry("session.disable_prepacking") == "1")
        except RuntimeError:  # not set
            found.append(False)
        return make(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    return found


def test_answers_are_the_same_within_rounding(bundle: Path, unpacked: list[bool]) -> None:
    with CascadeRuntime(bundle) as usual, CascadeRuntime(bundle, packed=False) as quick:
        expected, found = (runtime.without_exits().predict(TEXTS) for runtime in (usual, quick))
        assert [one.label for one in found] == [one.label for one in expected]
        np.testing.assert_allclose(
            [one.probabilities for one in found], [one.probabilities for one in expected], atol=1e-5
        )
        assert quick.with_members(["small"]).predict(TEXTS[:1]) == quick.with_members(["small"]).predict(TEXTS[:1])
    assert set(unpacked) == {False, True}


def test_a_command_with_a_few_texts_packs_nothing(
    bundle: Path, unpacked: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--model-dir", str(bundle), *TEXTS[:3]]) == 0
    assert unpacked
    assert all(unpacked)
    unpacked.clear()
    assert main(["predict", "--model-dir", str(bundle), *TEXTS[:5]]) == 0
    assert not any(unpacked)
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_members_in_int8_are_packed_always(copied: Path, unpacked: list[bool]) -> None:
    """Their logits are promised to the bit, and some parts would round otherwise."""
    manifest = json.loads((copied / "cascade.json").read_text())
    manifest.pop("sha256", None)
    manifest["members"][0]["precision"] = "int8"
    (copied / "cascade.json").write_text(json.dumps(manifest))
    with CascadeRuntime(copied, packed=False, thresholds=1.0) as runtime:
        runtime.predict(TEXTS[:1])
    assert unpacked[-2:] == [True, True]
    assert not any(unpacked[:-2])
