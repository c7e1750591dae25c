"""The built-in demo task: voice commands for a smart home, twelve intents, written for this project.

`utterances.tsv` holds hand-written commands, `templates.json` patterns with slots that are filled at random
(seeded) for variety. Both are `direct` ("switch on the lamp") or `indirect` ("it's getting dark in here"). There are
three parts: `train`, `tuning` (to choose thresholds on) and `heldout` (to report on). No phrasing occurs in two of
them, and the phrasings of the last two were told apart at random.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from typing import NamedTuple

from cascade_rt.errors import InputError
from cascade_rt.types import Text

LABELS = (
    "lights_on",
    "lights_off",
    "lights_dim",
    "heat_up",
    "cool_down",
    "blinds_open",
    "blinds_close",
    "door_lock",
    "door_unlock",
    "music_play",
    "music_stop",
    "vacuum_start",
)
SPLITS = ("train", "tuning", "heldout")
KINDS = ("direct", "indirect")

_ROWS = {"train": 410, "tuning": 52, "heldout": 52}  # of every intent
_ROUNDS = 3  # commands of a pattern at most
_DRAWS = 20  # to find different ones; an unadorned pattern without slots has one
_UNADORNED = 0.4  # share of the generated imperatives without words of courtesy


class Utterance(NamedTuple):
    """A hand-written command, or a pattern (its slots not filled)."""

    text: str
    label: str
    kind: str
    split: str
    imperative: bool = False
    """True if words of courtesy fit around it ("could you ...")."""


def load(split: str, kind: str | None = None) -> list[tuple[Text, str]]:
    """Return the (command, intent) rows of a split, all or of one kind.

    `split` is "train", "tuning" or "heldout"; `kind` is "direct" or "indirect".
    """
    if split not in SPLITS or kind not in (None, *KINDS):
        raise InputError(f"found {split!r} and {kind!r}, expected {', '.join(SPLITS)}, and {' or '.join(KINDS)}")
    written = utterances()
    seen = {row.text.lower() for row in written}
    patterns, slots, courtesies = templates()
    rows: list[Utterance] = []
    for label in LABELS:
        ours = [row for row in written if (row.split, row.label) == (split, label)]
        sources = [pattern for pattern in patterns if (pattern.split, pattern.label) == (split, label)]
        random.Random(f"smart-home {split} {label}").shuffle(sources)
        for row in _generate(sources, slots, courtesies):
            if len(ours) == _ROWS[split]:
                break
            if row.text.lower() not in seen:
                seen.add(row.text.lower())
                ours.append(row)
        rows += ours
    return [(row.text, row.label) for row in rows if kind in (None, row.kind)]


def utterances() -> list[Utterance]:
    """Return the hand-written commands of all parts."""
    lines = files(__package__).joinpath("utterances.tsv").read_text("utf-8").splitlines()
    return [Utterance(text, label, kind, split) for text, label, kind, split in (row.split("\t") for row in lines[1:])]


def templates() -> tuple[list[Utterance], dict[str, list[str]], list[str]]:
    """Return the patterns of all parts, what fills their slots by name, and the words of courtesy.

    A slot is a name (`{room}`) or lists what fills it (`{warm|hot}`).
    """
    content = json.loads(files(__package__).joinpath("templates.json").read_text("utf-8"))
    patterns = [
        Utterance(text, label, "indirect" if group == "indirect" else "direct", split, group == "imperative")
        for label, splits in content["intents"].items()
        for split, groups in splits.items()
        for group, texts in groups.items()
        for text in texts
    ]
    return patterns, content["slots"], content["courtesies"]


def _generate(
    patterns: Sequence[Utterance], slots: Mapping[str, Sequence[str]], courtesies: Sequence[str]
) -> Iterator[Utterance]:
    """Yield a command of every pattern, then another one of every pattern, and so on."""
    commands = [(pattern, _fill(pattern, slots, courtesies)) for pattern in patterns]
    for _ in range(_ROUNDS):
        for pattern, filled in commands:
            for text in islice(filled, 1):
                yield pattern._replace(text=text)


def _fill(pattern: Utterance, slots: Mapping[str, Sequence[str]], courtesies: Sequence[str]) -> Iterator[str]:
    """Yield different commands; they depend on this pattern alone, not on those before it."""
    draw = random.Random(f"smart-home {pattern.label} {pattern.text}")
    seen = set()
    for _ in range(_DRAWS):
        command = re.sub(
            r"\{([^{}]+)\}",
            lambda slot: draw.choice(slot[1].split("|") if "|" in slot[1] else slots[slot[1]]),
            pattern.text,
        )
        if pattern.imperative and draw.random() >= _UNADORNED:
            command = draw.choice(courtesies).format(command)
        if command not in seen:
            seen.add(command)
            yield command
