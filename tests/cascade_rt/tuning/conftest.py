"""A bundle that is worth tuning: its small members were fitted to the answers of the biggest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cascade_rt import CascadeRuntime

from ...toy import LABELS, WORDS, Member, cascade_members, write_bundle

TEXTS = [
    " ".join(np.random.default_rng(seed).choice(WORDS, size=np.random.default_rng(seed).integers(1, 12)))
    for seed in range(240)
]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In this folder, `bundle` has members that agree with the biggest the more, the bigger they are; read only."""
    root = tmp_path_factory.mktemp("fitted")
    *smaller, big = cascade_members()
    answers = CascadeRuntime(write_bundle(root / "big", [big], thresholds=[])).predict(TEXTS)
    wanted = np.array([answer.label == np.array(LABELS) for answer in answers]) - 1 / len(LABELS)
    members = [_fitted(root, member, wanted) for member in smaller]
    return write_bundle(root / "bundle", [*members, big], thresholds=[0.8, 0.8])


def _fitted(root: Path, member: Member, wanted: np.ndarray) -> Member:
    """Return the member with a classifier that a ridge regression fitted to `wanted`, (texts, labels)."""
    width = len(member.weights["classifier.weight"].T)
    pooler = {"classifier.weight": np.eye(width, dtype=np.float32), "classifier.bias": np.zeros(width, np.float32)}
    headless = replace(member, weights=member.weights | pooler)
    labels = [str(index) for index in range(width)]
    folder = write_bundle(root / member.name, [headless], thresholds=[], labels=labels)
    pooled = np.insert(CascadeRuntime(folder).member_logits(TEXTS)[0][0].astype(float), 0, 1, axis=1)
    fit = 8 * np.linalg.solve(pooled.T @ pooled + np.eye(width + 1), pooled.T @ wanted).T.astype(np.float32)
    return replace(
        member, weights=member.weights | {"classifier.weight": fit[:, 1:].copy(), "classifier.bias": fit[:, 0]}
    )
