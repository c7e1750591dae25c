"""The plan of a build: parts of the data, members, recipes, the question to tune by, and estimated times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from cascade_export.check import MAX_ACCURACY_DROP, Check
from cascade_export.checkpoint import member_name
from cascade_export.member import AUTO, TABLE
from cascade_train.averaging import Network
from cascade_train.averaging_training import AveragingRecipe, untrained
from cascade_train.finetune import RECIPE_RANGES, Objective, Recipe, check_length, device, load_base
from cascade_train.inference import collator, features
from cascade_train.sources import load_tokenizer, pretrained
from cascade_train.tasks import Examples, TaskData, load_part, reserve
from cascade_train.unlabelled import variants
from transformers import AutoConfig

from cascade_rt.bundle.precisions import PRECISIONS
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.tuning.collect import FEWEST_TEXTS
from cascade_rt.tuning.report import Question
from cascade_rt.types import Text

_STEPS = 3000  # of a member, about, unless the epochs are given
_MOST_EPOCHS = 10
_NETWORK_STEPS, _FEWEST_EPOCHS = 20_000, 3  # of the member without layers, at most
_NETWORK_SECONDS = 4e-4  # of a text in such a step
_RATE, _HIGHEST_RATE = 7.5e-5, 6e-4  # of 12 layers of 384; the highest of all


@dataclass(frozen=True)
class Parts:
    """The data of a build, in parts that share no text."""

    data: TaskData
    """Training texts, and validation texts, which choose checkpoints, temperatures and precisions."""
    tuning: Examples
    """Texts that choose thresholds."""
    certification: Examples
    """A test set, used for no choice: it certifies and measures the result."""
    unlabelled: list[Text]
    """Texts to which small members learn the biggest one's answers: without labels, or variants of training texts."""


@dataclass(frozen=True)
class Asked:
    """Settings of a recipe that are asked for; None leaves the choice to the plan."""

    epochs: float | None = None
    learning_rate: float | None = None


NOTHING_ASKED = Asked()


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
class NetworkPlan:
    """A deep averaging network, the member without layers, and its training."""

    network: Network
    recipe: AveragingRecipe
    name: str = "DAN"
    distill_weight: float = 0.5
    """Weight of the biggest member's answers, lower than for members with layers, as is their temperature."""
    temperature: float = 1.0
    """Temperature of these answers."""


@dataclass(frozen=True)
class Plan:
    """A build."""

    parts: Parts
    members: tuple[MemberPlan, ...]
    """The biggest first: it teaches the others. Those with layers."""
    distill_weight: float
    temperature: float
    precision: str
    question: Question
    network: NetworkPlan | None = None
    """The member without layers; None for none."""
    bf16: bool | None = None
    """As asked; None leaves the choice to a measurement, whose result may be another one later."""
    max_accuracy_drop: float = MAX_ACCURACY_DROP
    """Percentage points that the precision may cost a member."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for what would only fail after hours of training."""
        Objective(temperature=self.temperature, distill_weight=self.distill_weight)
        of_all = [name for name in (*PRECISIONS, AUTO) if name != TABLE]
        if self.precision not in of_all:
            raise InvalidOption("precision", self.precision, f"one of {', '.join(of_all)}")
        Check(max_accuracy_drop=self.max_accuracy_drop)

    @property
    def teaches(self) -> bool:
        """True if a member learns the biggest one's answers: a network does so from unlabelled texts alone."""
        return len(self.members) > 1 or (self.network is not None and bool(self.parts.unlabelled))

    def data_settings(self) -> dict[str, Any]:
        """Return what identifies the labelled data and their split."""
        parts = self.parts
        examples = {"train": parts.data.train, "validation": parts.data.validation}
        examples |= {"tuning": parts.tuning, "certification": parts.certification}
        return {
            "task": parts.data.name,
            "labels": list(parts.data.labels),
            "data": {name: part.described() for name, part in examples.items()},
        }

    def member_settings(self, member: MemberPlan | NetworkPlan) -> dict[str, Any]:
        """Return what a member's weights depend on; a small member's depend on the biggest one's."""
        if isinstance(member, NetworkPlan):
            return asdict(member) | self.teaching()
        own = asdict(replace(member, recipe=replace(member.recipe, bf16=bool(self.bf16))))
        return own if member is self.members[0] else own | self.teaching()

    def teaching(self) -> dict[str, Any]:
        """Return what the biggest member's answers depend on, and their weight."""
        return {
            "teacher": self.member_settings(self.members[0]),
            "unlabelled": Examples(self.parts.unlabelled, [0] * len(self.parts.unlabelled)).described(),
            "distillation": {"weight": self.distill_weight, "temperature": self.temperature},
        }


@dataclass(frozen=True)
class Step:
    """One step of a plan."""

    name: str
    what: str
    texts: int
    seconds: float
    """Estimated from a few training steps here."""


def split(
    data: TaskData,
    unlabelled: Sequence[Text],
    *,
    share: float,
    seed: int,
    augment: int = 0,
    built_in: bool = False,
) -> Parts:
    """Split the data once.

    Tuning and certification take about a `share` each; the built-in task brings its own parts. Of texts that occur more
    than once the first is kept, and unlabelled texts that are labelled elsewhere are left out: a text that a member has
    learnt says nothing about others. `augment` adds that many variants of each training text to the unlabelled ones.
    Raises InputError for too few texts, or too few of a label.
    """
    if not 0 < share < 0.4:
        raise InvalidOption("reserve", share, "a number above 0 and below 0.4 (0.1 is usual)")
    seen = {_spelling(text) for text in data.validation.texts}
    rows = []
    for row, text in enumerate(data.train.texts):
        if (key := _spelling(text)) not in seen:
            seen.add(key)
            rows.append(row)
    data = replace(data, train=data.train.take(rows))
    if built_in:
        tuning, certification = load_part("tuning"), load_part("heldout")
    else:
        _check_size(data, share)
        data, tuning, certification = reserve(data, share, seed)
    seen |= {_spelling(text) for part in (tuning, certification) for text in part.texts}
    more = {_spelling(text): text for text in reversed([*unlabelled, *variants(data.train.texts, augment, seed)])}
    return Parts(data, tuning, certification, [text for key, text in reversed(more.items()) if key not in seen])


def _spelling(text: Text) -> str:
    """Return a text without what most tokenizers ignore, case and spacing, to find duplicates."""
    return "\t".join(" ".join(part.lower().split()) for part in ([text] if isinstance(text, str) else text))


def _check_size(data: TaskData, share: float) -> None:
    """Raise InputError where a part would be too small to choose by, or a label too rare to be in every part."""
    least = math.ceil(FEWEST_TEXTS * (1 - share) / share) + 1
    if len(data.train) < least:
        raise InputError(
            f"found {len(data.train)} training texts, expected at least {least}, to set aside twice {FEWEST_TEXTS} for "
            "thresholds and for the measurement; add texts, or set aside a larger reserve"
        )
    counts = data.task.indicators(data.train.answers(len(data.labels)), len(data.labels)).sum(axis=0)
    least = math.ceil((1 - share) / share)
    if rare := np.flatnonzero(counts < least).tolist():
        some = ", ".join(f"{data.labels[index]!r} {counts[index]}" for index in rare[:5]) + ", ..." * (len(rare) > 5)
        raise InputError(
            f"found labels with few training texts ({some}), expected at least {least} of each, so that some are in "
            "every part; add texts of these labels, merge them into others, or set aside a larger reserve"
        )


def plan_members(
    big: str,
    small: Sequence[str],
    train: int,
    unlabelled: int,
    *,
    recipe: Recipe,
    of_big: Asked = NOTHING_ASKED,
    of_small: Asked = NOTHING_ASKED,
) -> tuple[MemberPlan, ...]:
    """Return the members, the biggest first, from bases written as DIR or DIR=LAYERS.

    Unless epochs are asked for, a member takes about 3,000 steps, in at most 10 epochs, and the biggest in at least 2.
    Without learning rates deeper and wider members get lower ones. Raises InputError for a base that cannot be read,
    and InvalidOption for a small member that is not smaller.
    """
    read = [_base("big", big), *(_base("small", written) for written in small)]
    shared = read[1][0] if len(read) > 1 else read[0][0]  # the bundle's tokenizer: that of a small member, as in export
    members: list[MemberPlan] = []
    for base, truncated, config in read:
        layers = truncated or int(config.num_hidden_layers)
        size = (layers, layers * config.hidden_size**2)
        if not members:
            biggest = size
        elif size[0] > biggest[0] or size[1] >= biggest[1]:
            raise InvalidOption("small", base, f"an encoder that is smaller than {read[0][0]} ({biggest[0]} layers)")
        asked = of_small if members else of_big
        rate = min(_HIGHEST_RATE, _RATE * (12 / layers) * (384 / config.hidden_size))
        each = -(-(train + (unlabelled if members else 0)) // recipe.batch_size)
        usual = float(np.clip(round(_STEPS / each), 1 if members else 2, _MOST_EPOCHS))
        own = usual if asked.epochs is None else asked.epochs
        members.append(
            MemberPlan(
                name=_name(layers, base, members),
                base=base,
                truncated=truncated,
                layers=layers,
                tokenizer=None if _same_tokenizer(base, shared) else shared,
                recipe=replace(
                    recipe,
                    epochs=own,
                    learning_rate=float(f"{rate:.2g}") if asked.learning_rate is None else asked.learning_rate,
                    evaluations_per_epoch=max(1, min(4, round(4 / own))) if own else 1,
                ),
            )
        )
    return tuple(members)


def plan_network(texts: int, recipe: Recipe, epochs: float | None = None) -> NetworkPlan:
    """Return the member without layers for so many training texts, with a recipe's seed and length.

    Unless `epochs` is given, it takes about 20,000 steps, in 3 to 20 epochs. Raises InvalidOption where they are out of
    range.
    """
    usual = AveragingRecipe(max_length=recipe.max_length, seed=recipe.seed)
    if epochs is None:
        epochs = float(np.clip(_NETWORK_STEPS // -(-texts // usual.batch_size), _FEWEST_EPOCHS, usual.epochs))
    lowest, highest = RECIPE_RANGES["epochs"]
    if not lowest <= epochs <= highest:
        raise InvalidOption("dan_epochs", epochs, f"a number from {lowest:g} to {highest:g}")
    return NetworkPlan(Network(), replace(usual, epochs=epochs))


def preflight(plan: Plan) -> None:
    """Load every base under the bundle's tokenizer, so that what does not fit is found before anything is trained."""
    for member in plan.members:
        data = plan.parts.data
        tokenizer, model = load_base(member.base, data.labels, member.truncated, member.tokenizer, several=data.several)
        check_length(member.recipe.max_length, member.base, tokenizer, model)
    if (network := plan.network) is not None:
        source = plan.members[0].tokenizer or plan.members[0].base
        untrained(plan.parts.data, source, None, network.network, network.recipe)


def steps(plan: Plan) -> list[Step]:
    """Return what a build does, in order, and how long each step takes, from a few training steps here."""
    parts = plan.parts
    found: list[Step] = []
    big = plan.members[0]
    train, fresh = len(parts.data.train), len(parts.unlabelled)
    forward: dict[str, float] = {}
    what = f"{len(plan.members)} untrained members of at most 2 layers, together"
    found.append(Step("try the export", what, 0, 4.0 * len(plan.members)))
    for member in plan.members:
        texts = train + (fresh if member is not big else 0)
        each = _seconds_per_text(member, parts.data)
        forward[member.name] = each / 3  # a training step is about three forward passes
        validations = member.recipe.epochs * member.recipe.evaluations_per_epoch * len(parts.data.validation)
        seconds = each * texts * member.recipe.epochs + forward[member.name] * validations
        what = f"fine-tune {member.layers} layers of {Path(member.base).name}, {member.recipe.epochs:g} epochs at "
        what += f"{member.recipe.learning_rate:g}" + (f", with the answers of {big.name}" if member is not big else "")
        found.append(Step(f"train {member.name}", what, texts, seconds))
        if member is big and plan.teaches:
            what = f"its answers to {train} training" + (f" and {fresh} unlabelled" if fresh else "") + " texts"
            found.append(Step(f"answers of {big.name}", what, train + fresh, forward[big.name] * (train + fresh)))
    if (network := plan.network) is not None:
        single = forward[big.name] * load_tokenizer(big.tokenizer or big.base).vocab_size / 4  # of few tokens
        seconds = single + _NETWORK_SECONDS * (train + fresh) * network.recipe.epochs
        what = f"a deep averaging network, at most {network.recipe.epochs:g} epochs"
        what += f", with the answers of {big.name}" if fresh else ""
        found.append(Step(f"train {network.name}", what, train + fresh, seconds))
    checked, tuned = len(parts.data.validation), len(parts.tuning) + len(parts.certification)
    everything = sum(forward.values())
    count = len(plan.members) + (plan.network is not None)
    what = f"{count} members in {plan.precision}, calibrated and checked on {checked} texts"
    found.append(Step("export", what, checked, 15.0 * count + 4 * everything * checked))
    what = f"choose on {len(parts.tuning)} texts, measure on {len(parts.certification)} others"
    found.append(Step("tune", what, tuned, 10.0 + everything * tuned))
    return found


def _base(role: str, written: str) -> tuple[str, int | None, Any]:
    base, equals, layers = written.rpartition("=")
    if not equals or not layers.isdecimal() or Path(written).is_dir():
        base, layers = written, ""
    config = pretrained(AutoConfig, base)
    if not config.num_hidden_layers:
        raise InvalidOption(role, written, "an encoder, with layers")
    if layers and not 1 <= int(layers) <= config.num_hidden_layers:
        raise InvalidOption(role, written, f"1 to {config.num_hidden_layers} layers of {base}")
    return base, int(layers) if layers else None, config


def _name(layers: int, base: str, others: Sequence[MemberPlan]) -> str:
    """Return a member's name: its layers, and its base too where that is not enough."""
    name = f"{layers}L"
    taken = {member.name for member in others}
    if name in taken:
        name = f"{name}-{member_name(base)}"
    while name in taken:
        name += "-2"
    return name


def _same_tokenizer(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = (load_tokenizer(base) for base in (one, other))
    texts = ["A first text, and then some 1,234 more.", "naïve Zürich 🙂 don't"]
    return bool(
        first.get_vocab() == second.get_vocab()
        and first(texts).input_ids == second(texts).input_ids
        and first(texts, texts).input_ids == second(texts, texts).input_ids
    )


def _seconds_per_text(member: MemberPlan, data: TaskData) -> float:
    """Return the time of a training step here, per text, with texts of usual length."""
    tokenizer, model = load_base(member.base, data.labels, member.truncated, member.tokenizer, several=data.several)
    model.to(device())
    size = min(member.recipe.batch_size, len(data.train))
    some = data.train.take(np.linspace(0, len(data.train) - 1, 4 * size).astype(int).tolist())
    rows = features(tokenizer, model, some, member.recipe.max_length)
    rows.sort(key=lambda row: len(row["input_ids"]))
    collate = collator(tokenizer)
    batches = [  # of all lengths
        {name: values.to(device()) for name, values in collate(rows[start : start + size]).items()}
        for start in range(0, 4 * size, size)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    model.train()

    def step(batch: Any) -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=member.recipe.bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    started = perf_counter()
    for batch in batches:
        step(batch)
    return (perf_counter() - started) / (len(batches) * size)
