"""A fine-tuned classifier before its export, and whether several fit into one cascade."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cascade_train import RECORD, VALIDATION
from cascade_train.settings import Settings
from tokenizers import Tokenizer

from cascade_rt.engine.task import MultiLabel, SingleLabel, Task
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.readers import Example, read_examples
from cascade_rt.types import Text

_NUMBER = {True: "several labels per text (sigmoid)", False: "one label per text (softmax)"}
SHORTEST = 3  # a token between [CLS] and [SEP]

TRACE, OPTIMUM = "trace", "optimum"
EXPORTERS = {TRACE: "torch", OPTIMUM: "optimum-onnx"}
"""The exporters of torch weights by name, each with the package that it is part of."""

SENTENCES = (
    "Fine.",
    "The kettle is on and nobody is home 🙂",
    "What a curious little machine this has turned out to be!",
    "Please move my Thursday appointment to the week after next, if that suits the doctor.",
    "She read the letter twice, folded it along the old creases, and put it back where nobody would ever look for it.",
    "Der Zug nach Zürich fährt um 8:05 Uhr; le café coûte 3,20 €.",
    "",
    "Although the forecast had promised sunshine, the hikers reached the hut soaked to the skin, laughed about it over "
    "a bowl of soup, and agreed that they would not have missed the walk along the ridge for anything in the world.",
)
"""Texts for the check; with their repetitions they cover every length up to a model's maximum."""


def built_in_texts(pair: bool) -> list[Text]:
    """Return texts of many lengths, as pairs if wanted."""
    return [(one, other) for one in SENTENCES for other in SENTENCES[:2]] if pair else [*SENTENCES, *SENTENCES[::-1]]


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned classifier: with torch weights, or an ONNX file."""

    source: str
    name: str
    labels: tuple[str, ...]
    task: Task
    pair: bool
    max_length: int
    positions: int
    """The most tokens that it can take."""
    layers: int
    hidden_size: int
    intermediate_size: int | None
    parameters: int
    model_type: str
    backend: Tokenizer  # with the model's padding and truncation, which the runtime then follows
    training: Mapping[str, Any]  # what cascade-rt train recorded

    def write_tokenizer(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))

    def validation(self, most: int) -> list[Example]:
        """Return up to `most` examples, with labels, that training kept for validation; none if it kept none."""
        kept = Path(self.source) / VALIDATION
        return list(islice(read_examples(kept, pair=self.pair), most)) if kept.is_file() else []


def training_record(source: str) -> dict[str, Any]:
    """Return what `cascade-rt train` recorded about a folder; empty for one from elsewhere."""
    record = Path(source) / RECORD
    return dict(json.loads(record.read_text("utf-8"))) if record.is_file() else {}


def task_of(settings: Settings, recorded: Mapping[str, Any]) -> Task:
    """Return the task of a classifier: with several labels, at the cuts that training recorded, else 0.5."""
    if not settings.several:
        return SingleLabel()
    return MultiLabel(tuple(recorded.get("cuts") or (0.5,) * len(settings.labels)))


def member_name(source: str) -> str:
    """Return a member's name: that of its folder, or of its hub repository."""
    path = Path(source)
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else source.removeprefix("hf:")
    return re.sub(r"[^\w.-]", "-", name)


def checked_length(source: str, asked: int | None, recorded: Mapping[str, Any], longest: int) -> int:
    """Return the maximum length in tokens: as asked, as trained, or the longest; raise InputError beyond it."""
    if longest < SHORTEST:
        raise InputError(f"{source}: takes {longest} tokens (model_max_length, positions), expected {SHORTEST} or more")
    length = int(recorded.get("max_length", longest)) if asked is None else asked
    if not SHORTEST <= length <= longest:
        raise InvalidOption("max_length", length, f"{SHORTEST} to {longest} tokens for {source}")
    return length


def check_fit(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise CascadeError unless all members share labels, task, pair-ness and length; say what differs."""
    sources: dict[str, str] = {}
    for checkpoint in checkpoints:
        if checkpoint.name in sources:
            found = f"{sources[checkpoint.name]}, {checkpoint.source}"
            raise CascadeError(f"two members are called {checkpoint.name!r} ({found}); rename one folder")
        sources[checkpoint.name] = checkpoint.source
    first = checkpoints[0]
    for other in checkpoints[1:]:
        where = f"members {first.name!r} and {other.name!r} do not fit together:"
        if first.labels != other.labels:
            raise CascadeError(f"{where} labels {_shown(first.labels)} against {_shown(other.labels)}")
        if first.task.several != other.task.several:
            raise CascadeError(f"{where} {_NUMBER[first.task.several]} against {_NUMBER[other.task.several]}")
        if first.pair != other.pair:
            kinds = {True: "pairs", False: "single texts"}
            raise CascadeError(f"{where} {kinds[first.pair]} against {kinds[other.pair]}")
        if first.max_length != other.max_length:
            raise CascadeError(
                f"{where} maximum length {first.max_length} against {other.max_length} tokens; set one for all"
            )


def tokenizer_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the parts of `tokenizer.json` in which two members differ."""
    ours, theirs = json.loads(first.backend.to_str()), json.loads(other.backend.to_str())
    return [part for part in ours if ours[part] != theirs.get(part)]


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f", ... ({len(labels)})" if len(labels) > 6 else "")
