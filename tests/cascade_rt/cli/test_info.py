"""`cascade-rt info`: the manifest, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.bundle import write_manifest
from cascade_rt.cli import main

from ..bundle.manifests import Manifest, altered
from .commands import run


def test_info_shows_the_manifest(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    write_manifest(copied, read_bundle(copied))  # with a seal
    _, (manifest,), _ = run(capsys, "info", "--model-dir", copied, "--json")
    assert manifest == json.loads((copied / "cascade.json").read_text("utf-8"))
    assert main(["info", "--model-dir", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "single, up to 32 tokens" in shown
    assert all(name in shown for name in ("tiny", "small", "big", "bad, fine, good", "0.8000"))


def test_members_on_exact_kernels_are_named(
    capsys: pytest.CaptureFixture[str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(manifest: Manifest) -> None:
        manifest["members"][0] |= {"precision": "int8"}
        manifest["members"][1] |= {"precision": "int8", "weight_bits": 7}

    altered(copied, change)
    for saturating, named in ((False, False), (True, True)):
        monkeypatch.setattr("cascade_rt.engine.providers.int8_saturates", lambda found=saturating: found)
        assert main(["info", "--model-dir", str(copied)]) == 0
        assert ("tiny: run on exact int8 kernels here" in capsys.readouterr().out) == named
        assert CascadeRuntime(copied).stats().exact_kernels == (("tiny",) if named else ())
