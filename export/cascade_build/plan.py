"""What a build will do: parts of the data, members, recipes, the question to tune by, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from cascade_export.export import AUTO
from cascade_export.precision import PRECISIONS
from cascade_train.finetune import Objective, Recipe, collator, described_examples, features, load_base
from cascade_train.tasks import Examples, TaskData, load_part, reserve
from transformers import AutoConfig, AutoTokenizer

from cascade_rt.errors import InputError, InvalidOption, first_line
from cascade_rt.tuning.collect import FEWEST_TEXTS
from cascade_rt.tuning.report import Question
from cascade_rt.types import Text

_STEPS = 3000  # of the biggest member, unless the epochs are given
_EPOCHS = (2, 10)
_RATE, _HIGHEST_RATE = 5e-5, 2e-4  # of 12 layers of 384; the highest of all


@dataclass(frozen=True)
class Parts:
    """The data of a build, in parts that share no text."""

    data: TaskData
    """What members learn from, and what their checkpoints, temperatures and precisions are chosen by."""
    tuning: Examples
    """What thresholds are chosen by."""
    certification: Examples
    """What nothing is chosen by: it certifies and measures the result."""
    unlabelled: list[Text]
    """What small members learn from the biggest one's answers."""


@dataclass(frozen=True)
class MemberPlan:
    """A member: where it starts, and how it is trained."""

    name: str
    base: str
    truncated: int | None
    """Keep only the first K layers; None keeps all."""
    layers: int
    tokenizer: str | None
    """Where the tokenizer comes from; None for that of `base`."""
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    """A build."""

    parts: Parts
    members: tuple[MemberPlan, ...]
    """The biggest first: it teaches the others."""
    distill_weight: float
    temperature: float
    precision: str
    question: Question

    def __post_init__(self) -> None:
        """Raise InvalidOption for what would only fail after hours of training."""
        Objective(temperature=self.temperature, distill_weight=self.distill_weight)
        if self.precision not in (*PRECISIONS, AUTO):
            raise InvalidOption("precision", self.precision, f"one of {', '.join((*PRECISIONS, AUTO))}")

    def described(self) -> dict[str, Any]:
        """Return what a later run must share to continue this one."""
        parts = self.parts
        return {
            "task": parts.data.name,
            "labels": list(parts.data.labels),
            "data": {
                "train": described_examples(parts.data.train),
                "validation": described_examples(parts.data.validation),
                "tuning": described_examples(parts.tuning),
                "certification": described_examples(parts.certification),
                "unlabelled": described_examples(Examples(parts.unlabelled, [0] * len(parts.unlabelled))),
            },
            "members": [asdict(replace(member, recipe=replace(member.recipe, bf16=False))) for member in self.members],
            "distillation": {"weight": self.distill_weight, "temperature": self.temperature},
            "precision": self.precision,
            "question": asdict(self.question),
        }


@dataclass(frozen=True)
class Step:
    """One step of a plan."""

    name: str
    what: str
    texts: int
    seconds: float | None
    """Estimated; None where it was not."""


def split(data: TaskData, unlabelled: Sequence[Text], *, share: float, seed: int, built_in: bool = False) -> Parts:
    """Split the data once.

    Tuning and certification take about a `share` each; the built-in task brings its own parts. Of texts that occur more
    than once the first is kept, and unlabelled texts that are labelled elsewhere are left out: a text that a member has
    learnt says nothing about others. Raises InputError for too few texts, or too few of a label.
    """
    if not 0 < share < 0.4:
        raise InvalidOption("reserve", share, "a number above 0 and below 0.4 (0.1 is usual)")
    rows = dict(zip(reversed(data.train.texts), reversed(range(len(data.train))), strict=True))  # of each first one
    data = replace(data, train=data.train.take(sorted(rows[text] for text in rows.keys() - set(data.validation.texts))))
    if built_in:
        tuning, certification = load_part("tuning"), load_part("heldout")
    else:
        _check_size(data, share)
        data, tuning, certification = reserve(data, share, seed)
    known = {text for part in (data.train, data.validation, tuning, certification) for text in part.texts}
    return Parts(data, tuning, certification, [text for text in dict.fromkeys(unlabelled) if text not in known])


def _check_size(data: TaskData, share: float) -> None:
    """Raise InputError where a part would be too small to choose by, or a label too rare to be in every part."""
    texts = len(data.train) + len(data.validation)
    if share * texts < FEWEST_TEXTS:
        raise InputError(
            f"found {texts} texts, expected at least {math.ceil(FEWEST_TEXTS / share)}: {share:.0%} of them choose "
            f"thresholds, and that takes {FEWEST_TEXTS} or more; add texts, or set aside a larger `reserve`"
        )
    counts = np.bincount(data.train.labels, minlength=len(data.labels))
    least = math.ceil((1 - share) / share)
    if rare := np.flatnonzero(counts < least).tolist():
        some = ", ".join(f"{data.labels[index]!r} {counts[index]}" for index in rare[:5]) + ", ..." * (len(rare) > 5)
        raise InputError(
            f"found labels with few training texts ({some}), expected at least {least} of each, so that some are in "
            "every part; add texts of these labels, merge them into others, or set aside a "
            "larger `reserve`"
        )


def plan_members(
    big: str,
    small: Sequence[str],
    train: int,
    unlabelled: int,
    *,
    recipe: Recipe,
    epochs: float | None = None,
    small_epochs: float | None = None,
    learning_rate: float | None = None,
) -> tuple[MemberPlan, ...]:
    """Return the members, the biggest first, from bases written as DIR or DIR=LAYERS.

    Without `epochs` the biggest member takes about 3,000 steps, in 2 to 10 epochs; `small_epochs`, of the others, are
    as many unless given. Without `learning_rate` deeper and wider members get lower ones. Raises InputError for a base
    that cannot be read, and InvalidOption for a small member that is not smaller.
    """
    read = [_base(written) for written in (big, *small)]
    biggest = read[0]
    members: list[MemberPlan] = []
    for base, truncated, config in read:
        layers = truncated or int(config.num_hidden_layers)
        if members and layers >= members[0].layers:
            raise InvalidOption(
                "small", base, f"encoders with fewer layers than the {members[0].layers} of {biggest[0]}"
            )
        if recipe.max_length > (most := getattr(config, "max_position_embeddings", recipe.max_length)):
            raise InvalidOption("max_length", recipe.max_length, f"at most {most}, the positions of {base}")
        rate = learning_rate or min(_HIGHEST_RATE, _RATE * (12 / layers) * (384 / config.hidden_size))
        steps = -(-(train if not members else train + unlabelled) // recipe.batch_size)
        own = (
            (small_epochs if members else None)
            or epochs
            or float(np.clip(round(_STEPS / -(-train // recipe.batch_size)), *_EPOCHS))
        )
        members.append(
            MemberPlan(
                name=_name(layers, base, members),
                base=base,
                truncated=truncated,
                layers=layers,
                tokenizer=None if _same_tokenizer(base, biggest[0]) else biggest[0],
                recipe=replace(
                    recipe,
                    epochs=own,
                    learning_rate=float(f"{rate:.2g}"),
                    evaluations_per_epoch=max(1, min(4, round(4 / own), steps)),
                ),
            )
        )
    return tuple(members)


def steps(plan: Plan, estimated: bool) -> list[Step]:
    """Return what a build does, in order; with `estimated`, how long it takes, from a few training steps here."""
    parts, found = plan.parts, []
    big, *small = plan.members
    train, fresh = len(parts.data.train), len(parts.unlabelled)
    forward: dict[str, float] = {}
    for member in plan.members:
        texts = train + (fresh if member is not big else 0)
        seconds = None
        if estimated:
            each = _seconds_per_text(member, parts.data)
            forward[member.name] = each / 3  # a training step is about three forward passes
            validations = member.recipe.epochs * member.recipe.evaluations_per_epoch * len(parts.data.validation)
            seconds = each * texts * member.recipe.epochs + forward[member.name] * validations
        what = f"fine-tune {member.layers} layers of {Path(member.base).name}, {member.recipe.epochs:g} epochs at "
        what += f"{member.recipe.learning_rate:g}" + (f", with the answers of {big.name}" if member is not big else "")
        found.append(Step(f"train {member.name}", what, texts, seconds))
        if member is big and small:
            what = f"its answers to {train} training" + (f" and {fresh} unlabelled" if fresh else "") + " texts"
            teacher = forward[big.name] * (train + fresh) if estimated else None
            found.append(Step(f"answers of {big.name}", what, train + fresh, teacher))
    checked, tuned = len(parts.data.validation), len(parts.tuning) + len(parts.certification)
    everything = sum(forward.values())
    what = f"{len(plan.members)} members in {plan.precision}, calibrated and checked on {checked} texts"
    exported = 15.0 * len(plan.members) + 4 * everything * checked if estimated else None
    found.append(Step("export", what, checked, exported))
    what = f"choose on {len(parts.tuning)} texts, measure on {len(parts.certification)} others"
    found.append(Step("tune", what, tuned, 10.0 + everything * tuned if estimated else None))
    return found


def _base(written: str) -> tuple[str, int | None, Any]:
    base, equals, layers = written.rpartition("=")
    if not equals or not layers.isdecimal():
        base, layers = written, ""
    try:
        config = AutoConfig.from_pretrained(base)
    except Exception as error:  # a folder can be broken in many ways, and each library has its own errors
        raise InputError(
            f"cannot read the base model {base!r} ({first_line(error)}); expected a Hugging Face folder, or a hub id "
            "and a network, with =K behind it to keep only the first K layers"
        ) from error
    if layers and not 1 <= int(layers) <= config.num_hidden_layers:
        raise InvalidOption("small", written, f"1 to {config.num_hidden_layers} layers of {base}")
    return base, int(layers) if layers else None, config


def _name(layers: int, base: str, others: Sequence[MemberPlan]) -> str:
    """Return a member's name: its layers, and its base too where that is not enough."""
    name = f"{layers}L"
    taken = {member.name for member in others}
    if name in taken:
        name = f"{name}-{Path(base).name}"
    while name in taken:
        name += "-2"
    return name


def _same_tokenizer(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = (AutoTokenizer.from_pretrained(base) for base in (one, other))
    texts = ["A first text, and then some 1,234 more.", "naïve Zürich 🙂 don't"]
    return bool(
        first.get_vocab() == second.get_vocab()
        and first(texts).input_ids == second(texts).input_ids
        and first(texts, texts).input_ids == second(texts, texts).input_ids
    )


def _seconds_per_text(member: MemberPlan, data: TaskData) -> float:
    """Return the time of a training step here, per text, with texts of usual length."""
    tokenizer, model = load_base(member.base, data.labels, member.truncated, tokenizer=member.tokenizer)
    size = min(member.recipe.batch_size, len(data.train))
    some = data.train.take(np.linspace(0, len(data.train) - 1, 4 * size).astype(int).tolist())
    rows = features(tokenizer, model, some, member.recipe.max_length)
    rows.sort(key=lambda row: len(row["input_ids"]))
    collate: Callable[[Any], Any] = collator(tokenizer)
    batches = [collate(rows[start : start + size]) for start in range(0, 4 * size, size)]  # of all lengths
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    model.train()

    def step(batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=member.recipe.bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    started = perf_counter()
    for batch in batches:
        step(batch)
    return (perf_counter() - started) / (len(batches) * size)
