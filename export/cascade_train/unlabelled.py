"""Texts without labels, to which a member learns its teacher's answers: given ones, and variants of training texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from cascade_rt.errors import InvalidOption
from cascade_rt.io.fields import is_blank
from cascade_rt.types import Text
from cascade_train.tasks import Examples, TaskData

_DROPPED = 0.2  # of the words, in every other variant


def variants(texts: Sequence[Text], each: int, seed: int) -> list[Text]:
    """Return up to `each` variants of every text that differ from all texts and from one another.

    Half of them lack about a fifth of their words; in the other half, the first or last third is that of another text.
    A variant need not make sense: it has no label, but the biggest member's answer. The same `seed` gives the same
    variants. Of a pair, one text is varied. Raises InvalidOption unless `each` is 0 to 100.
    """
    if not 0 <= each <= 100:
        raise InvalidOption("augment", each, "a whole number from 0 to 100")
    draw = Random(seed)
    found: dict[Text, None] = {}
    for text in texts:
        for _ in range(each):
            other = draw.choice(texts)
            if isinstance(text, str) or isinstance(other, str):
                found[_varied(_side(text, 0), _side(other, 0), draw)] = None
                continue
            side = draw.randrange(2)
            varied = _varied(text[side], other[side], draw)
            found[(varied, text[1]) if side == 0 else (text[0], varied)] = None
    known = set(texts)
    return [text for text in found if text not in known and not is_blank(text)]


def _side(text: Text, side: int) -> str:
    return text if isinstance(text, str) else text[side]


def _varied(text: str, other: str, draw: Random) -> str:
    words, others = text.split(), other.split()
    if draw.random() < 0.5:
        return " ".join(word for word in words if draw.random() >= _DROPPED)
    if draw.random() < 0.5:
        return " ".join(words[: -(-2 * len(words) // 3)] + others[-(-2 * len(others) // 3) :])
    return " ".join(others[: len(others) // 3] + words[len(words) // 3 :])


def with_unlabelled(data: TaskData, unlabelled: Sequence[Text]) -> TaskData:
    """Return the data with the unlabelled texts behind the training texts; their labels are to be filled in."""
    train, none = data.train, () if data.several else 0
    return replace(data, train=Examples([*train.texts, *unlabelled], [*train.labels, *([none] * len(unlabelled))]))


def with_answers(data: TaskData, teacher: NDArray[np.float32], labelled: int) -> TaskData:
    """Return the data with the teacher's answers as the labels of the unlabelled texts, which are the last.

    With several labels, its probabilities: few of them may be above a half. `teacher`: its logits for all training
    texts, (texts, labels).
    """
    found = data.task.probabilities(teacher[labelled:])
    answers = found if data.several else data.task.answers(found)
    labels = [*data.train.labels[:labelled], *answers.tolist()]
    return replace(data, train=Examples(data.train.texts, labels))
