"""Answers of made-up members, to choose thresholds from."""

from __future__ import annotations

import numpy as np

from cascade_rt.engine.exit_rules import MaximumProbability
from cascade_rt.tuning.operating_points import Recorded


def drawn(seed: int, texts: int, members: int = 3) -> Recorded:
    """Members that are the better the bigger they are, and surer where they are right."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(texts)
    skill = np.linspace(0.7, 1.0, members)[:, None]
    right = generator.random((members, texts)) < skill * (1.1 - 0.6 * hardness)
    confidences = np.clip(0.5 + 0.3 * right + 0.25 * generator.random((members, texts)), 0, 1)
    costs = np.array([1.0, 2.0, 6.0, 12.0])[:members, None] * (1 + generator.random(texts))
    rule = MaximumProbability((1.0,) * (members - 1))
    return Recorded(rule, confidences, right, costs, generator.random(texts) / 10)


def calibrated(seed: int, texts: int) -> Recorded:
    """Two members for two classes: the last knows the probabilities that labels are drawn with, the first about."""
    generator = np.random.default_rng(seed)
    logits = 3 * generator.standard_normal(texts)
    first, last = (1 / (1 + np.exp(-some)) for some in (logits + 2 * generator.standard_normal(texts), logits))
    labels = generator.random(texts) < last
    answers = np.stack([first, last]) > 0.5
    confidences = np.maximum([first, last], 1 - np.array([first, last]))
    costs = np.array([1.0, 10.0])[:, None] * np.ones(texts)
    expected = np.where(answers, last, 1 - last)
    rule = MaximumProbability((1.0,))
    return Recorded(rule, confidences, answers == labels, costs, np.zeros(texts), expected=expected)
