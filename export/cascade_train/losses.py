"""Additional training losses: how confident a member may be (DAR), and what a bigger member answers (distillation).

All are plain functions of a batch's logits, so any member can be trained with them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def confidence(logits: Tensor) -> Tensor:
    """Return the largest class probability of each instance, float (batch,), from logits (batch, labels)."""
    return torch.softmax(logits.float(), dim=-1).amax(dim=-1)


def difficulty_aware_regularization(logits: Tensor, difficulty: Tensor, margin: float) -> Tensor:
    """Return the difficulty-aware regularization of a batch (paper, section 3.3), a scalar.

    The mean, over all pairs of one easy and one difficult instance, of max(0, c(difficult) - c(easy) + margin): the
    confidence of an easy instance should exceed that of a difficult one by `margin`. 0 where the batch has no such
    pair. `logits`: (batch, labels); `difficulty`: 0 (easy) or 1, (batch,). Eq. (5)-(6), as printed, would push the
    difficult instance's confidence up; the text around them describes this, and equal difficulty adds nothing.
    """
    sure = confidence(logits)
    easy, difficult = sure[difficulty == 0], sure[difficulty == 1]
    violations = torch.relu(difficult[:, None] - easy[None, :] + margin)
    return violations.sum() / max(1, violations.numel())


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the soft loss of knowledge distillation (Hinton et al., 2015), a scalar.

    T^2 times the mean Kullback-Leibler divergence of the student's softened answers from the teacher's, both
    logits of shape (batch, labels); T^2 keeps the size of its gradients apart from the temperature T.
    """
    student = functional.log_softmax(logits.float() / temperature, dim=-1)
    target = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
