"""Training losses: how confident a member may be (DAR), what a bigger member answers, what a bigger encoder computes.

All are plain functions of a batch: the first three of logits, so any member can be trained with them; the others of
hidden states, for patient distillation, and for general distillation (`distil.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def confidence(logits: Tensor, *, several: bool = False) -> Tensor:
    """Return the largest class probability of each instance, float (batch,), from logits (batch, labels).

    With several labels per text, the smallest probability of a decision about a label.
    """
    if several:
        return torch.sigmoid(logits.float().abs()).amin(dim=-1)
    return torch.softmax(logits.float(), dim=-1).amax(dim=-1)


def difficulty_aware_regularization(
    logits: Tensor, difficulty: Tensor, margin: float, *, several: bool = False
) -> Tensor:
    """Return the difficulty-aware regularization of a batch (paper, section 3.3), a scalar.

    The mean, over all pairs of one easy and one difficult instance, of max(0, c(difficult) - c(easy) + margin): the
    confidence of an easy instance should exceed that of a difficult one by `margin`. 0 where the batch has no such
    pair. `logits`: (batch, labels); `difficulty`: 0 (easy) or 1, (batch,); `several`: that of `confidence`. Eq.
    (5)-(6), as printed, would push the difficult instance's confidence up; the text around them describes this, and
    equal difficulty adds nothing.
    """
    sure = confidence(logits, several=several)
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


def distillation_of_sets(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the soft loss of knowledge distillation with several labels per text, a scalar.

    T^2 times the mean, over texts and labels, of the Kullback-Leibler divergence of the student's softened decision
    from the teacher's; arguments as of `distillation`, whose one distribution over the labels is here one for each.
    """
    softened = teacher.float() / temperature
    target = torch.sigmoid(softened)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits.float() / temperature, target)
    return (cross_entropy - functional.binary_cross_entropy_with_logits(softened, target)) * temperature**2


def patient_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the patient loss (BERT-PKD; Sun et al., 2019, Eq. 7), a scalar from 0 to 4.

    The squared distance of the student's first-token hidden states from the teacher's, both scaled to length 1. Eq. 7
    is a sum over texts and layers; this is the mean, so that its weight holds for any batch and depth. `student` and
    `teacher`: (batch, layers, hidden), of the layers that are matched.
    """
    ours, theirs = functional.normalize(student.float(), dim=-1), functional.normalize(teacher.float(), dim=-1)
    return (ours - theirs).square().sum(-1).mean()


def hidden_state_error(student: Tensor, teacher: Tensor, mask: Tensor, variance: float) -> Tensor:
    """Return the mean squared error of hidden states, divided by the teacher's variance, a scalar.

    0 is a perfect student; 1 is one that answers every token with the teacher's mean. `student` and `teacher`:
    (batch, tokens, hidden); `mask`: true for real tokens, bool (batch, tokens).
    """
    return (student.float() - teacher.float())[mask].square().mean() / variance


def mean_vector_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the cosine of the student's and the teacher's mean vectors, float (batch,).

    Takes the arguments of `hidden_state_error`; a text's mean vector is that of its real tokens.
    """
    real = mask[..., None].float()
    return functional.cosine_similarity((student.float() * real).sum(1), (teacher.float() * real).sum(1), dim=-1)


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return how much the student's self-attention relations differ from the teacher's, a scalar.

    MiniLMv2 (Wang et al., 2021, section 3): all heads of the queries (or keys, or values) of a layer are joined and
    split again into `heads` relation heads; the scaled dot products of a token's vector with those of all tokens, after
    softmax, are its relations. The loss is the Kullback-Leibler divergence of the student's from the teacher's, the
    mean over heads and real tokens. `student` and `teacher`: (batch, tokens, size), sizes may differ; `mask`: bool
    (batch, tokens).
    """

    def relations(vectors: Tensor) -> Tensor:
        split = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = split @ split.mT / math.sqrt(split.shape[-1])
        return torch.log_softmax(scores.masked_fill(~mask[:, None, None, :], -1e9), dim=-1)

    target = relations(teacher)
    divergence = (target.exp() * (target - relations(student))).sum(-1)
    return divergence.mean(1)[mask].mean()
