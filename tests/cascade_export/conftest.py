"""Bundles that the exporter makes, for tests of what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(member_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of three members on single texts, exported from torch; read only."""
    from cascade_export.export import export_bundle

    output = tmp_path_factory.mktemp("exported") / "single"
    export_bundle([str(folder) for folder in member_folders], output, threshold=0.8, max_length=32)
    return output


@pytest.fixture(scope="session")
def bundle(exported: Path) -> Path:
    """In this folder, `bundle` is the exported one, not the toy."""
    return exported
