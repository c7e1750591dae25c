"""Promises of SECURITY.md about bundles and caches that nobody has examined, and about clusters that we start."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from cascade_rt import BundleError, CascadeRuntime, read_bundle
from cascade_rt.bundle import sha256_of
from cascade_rt.cli import main
from cascade_rt.cluster import cluster
from cascade_rt.tuning.collect import collect

from ..toy import WORDS
from .bundle.manifests import altered, set_to

TEXTS = [f"{WORDS[index % 30]} {WORDS[index % 7]}" for index in range(60)]


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_looking_at_a_bundle_loads_no_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    monkeypatch.setattr("tokenizers.Tokenizer", None)
    read_bundle(bundle)
    assert main(["info", "--model-dir", str(bundle)]) == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "words.bin"])
def test_files_too_big_are_refused_before_they_are_read(copied: Path, name: str) -> None:
    """Whatever the manifest calls them; the files are sparse, so they take no space."""
    (copied / "tokenizer.json").rename(copied / name)
    with (copied / name).open("r+b") as stream:
        stream.truncate(256 * 2**20 + 1)
    altered(copied, set_to("tokenizer", "file", to=name))
    with pytest.raises(BundleError, match="over 256 MiB, too big for a tokenizer"):
        read_bundle(copied)
    with (copied / "cascade.json").open("r+b") as stream:
        stream.truncate(16 * 2**20 + 1)
    with pytest.raises(BundleError, match="over 16 MiB, too big for a manifest"):
        read_bundle(copied)


def test_operators_of_others_are_not_run(copied: Path) -> None:
    path = copied / "tiny.onnx"
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("others", 1))
    model.graph.node[-1].domain = "others"
    onnx.save(model, path)
    altered(copied, set_to("members", 0, "sha256", to=sha256_of(path)))
    with pytest.raises(BundleError, match="tiny.onnx"):
        CascadeRuntime(copied).predict(["a film"])


def test_a_cache_is_not_unpickled(bundle: Path, tmp_path: Path) -> None:
    runtime = CascadeRuntime(bundle)
    first = collect(runtime, TEXTS, None, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    evil = np.empty(1, dtype=object)
    evil[0] = Evil()
    np.savez(kept, logits=evil, lengths=evil)
    again = collect(runtime, TEXTS, None, cache=tmp_path / "cache")
    assert not Path("unpickled").exists()
    assert np.array_equal(again.answers["layers"].observed, first.answers["layers"].observed)
    pickle.loads(pickle.dumps(Evil()))
    assert Path("unpickled").exists(), "it would have"


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_a_cluster_that_is_started_here_reports_no_usage(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    if before:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", before)
    started: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        started.append(settings | {"reports": os.environ["RAY_USAGE_STATS_ENABLED"]})

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster():
        pass
    assert [(each["reports"], each["include_dashboard"]) for each in started] == [(after, False)]
