"""DAR against a plain double loop, its gradients, and distillation against the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cascade_train.losses import confidence, difficulty_aware_regularization, distillation
from hypothesis import given
from hypothesis import strategies as st

_LOGIT = st.floats(-8, 8, width=32)


@st.composite
def _batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size, labels = draw(st.integers(1, 12)), draw(st.integers(2, 4))
    row = st.lists(_LOGIT, min_size=labels, max_size=labels)
    logits = draw(st.lists(row, min_size=size, max_size=size))
    difficulty = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return torch.tensor(logits), torch.tensor(difficulty)


@given(_batches(), st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_dar_is_the_mean_of_a_double_loop(batch: tuple[torch.Tensor, torch.Tensor], margin: float) -> None:
    logits, difficulty = batch
    sure = [max(math.exp(x) for x in row) / sum(math.exp(x) for x in row) for row in logits.tolist()]
    total, pairs = 0.0, 0
    for i, first in enumerate(difficulty.tolist()):
        for j, second in enumerate(difficulty.tolist()):
            if first == 1 and second == 0:
                pairs += 1
                total += max(0.0, sure[i] - sure[j] + margin)
    expected = total / pairs if pairs else 0.0
    assert difficulty_aware_regularization(logits, difficulty, margin).item() == pytest.approx(expected, abs=1e-5)


def test_its_gradients_lower_the_difficult_and_raise_the_easy() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.5, 0.0]], requires_grad=True)
    difficulty = torch.tensor([0, 1])
    before = confidence(logits).detach()
    difficulty_aware_regularization(logits, difficulty, 0.5).backward()
    assert logits.grad is not None
    after = confidence(logits.detach() - 0.1 * logits.grad)
    assert after[0] > before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("difficulty", [[0, 0, 0], [1, 1, 1]])
def test_without_pairs_it_is_zero_and_has_no_gradient(difficulty: list[int]) -> None:
    logits = torch.randn(3, 2, generator=torch.manual_seed(0), requires_grad=True)
    loss = difficulty_aware_regularization(logits, torch.tensor(difficulty), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_pairs_that_are_apart_by_the_margin_add_nothing() -> None:
    logits = torch.tensor([[20.0, 0.0], [0.0, 0.0]], requires_grad=True)  # confidences 1 and 0.5
    assert difficulty_aware_regularization(logits, torch.tensor([0, 1]), 0.5).item() == pytest.approx(0, abs=1e-6)
    assert difficulty_aware_regularization(logits, torch.tensor([1, 0]), 0.5).item() == pytest.approx(1, abs=1e-6)


@given(_batches(), st.floats(0.5, 8))
def test_distillation_is_the_scaled_divergence(batch: tuple[torch.Tensor, torch.Tensor], temperature: float) -> None:
    logits, _ = batch
    teacher = logits.flip(0) * 0.5 + 1
    student_p = np.exp(logits.double().numpy() / temperature)
    teacher_p = np.exp(teacher.double().numpy() / temperature)
    student_p /= student_p.sum(axis=1, keepdims=True)
    teacher_p /= teacher_p.sum(axis=1, keepdims=True)
    expected = temperature**2 * np.mean(np.sum(teacher_p * np.log(teacher_p / student_p), axis=1))
    assert distillation(logits, teacher, temperature).item() == pytest.approx(expected, abs=1e-4)
    assert distillation(logits, logits, temperature).item() == pytest.approx(0, abs=1e-6)
