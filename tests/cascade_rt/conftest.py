"""For the runtime's tests: multi-exit models, which are the segments of one model, and one thread by default."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..toy import Member, cascade_members, encoder_weights, write_bundle, write_segments


@pytest.fixture(scope="session")
def two_segments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers in two segments under patience; read only."""
    return write_segments(tmp_path_factory.mktemp("segments") / "two", exit_rule={"kind": "patience", "patience": 1})


@pytest.fixture(scope="session")
def four_segments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers in four segments under patience 1; read only.

    Two segments could not show patience: an agreement needs two of them, and the second is the last.
    """
    folder = tmp_path_factory.mktemp("segments") / "four"
    return write_segments(folder, segments=4, layers_each=1, exit_rule={"kind": "patience", "patience": 1})


@pytest.fixture(scope="session")
def with_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of words, whose graph has embeddings and a head alone, before the members of the cascade; read only."""
    bag = Member("bag", encoder_weights(layers=1, hidden=16, seed=4), layers=range(0))
    folder = tmp_path_factory.mktemp("zero") / "bundle"
    members = [bag, *cascade_members()]
    write_bundle(folder, members, thresholds=[0.6, 0.8, 0.8], extra={"format_version": 3})
    manifest = json.loads((folder / "cascade.json").read_text())
    manifest["members"][0]["flops"] = [200, 64]
    (folder / "cascade.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_usable_cpu() -> Iterator[None]:
    """Let sessions run on one thread where a test names no number: waking more takes longer than a toy runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        yield
