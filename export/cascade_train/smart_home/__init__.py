"""The built-in demo task: voice commands for a smart home, twelve intents, written for this project.

`utterances.tsv` holds hand-written commands, `templates.json` patterns with slots that are filled at random
(seeded) for variety. Both are `direct` ("switch on the lamp") or `indirect` ("it's getting dark in here"), and
no phrasing of the held-out part occurs in training.
"""

from __future__ import annotations

import json
import random
import re
from importlib.resources import files
from typing import Any

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

_GENERATED_PER_TEMPLATE = {"train": 4, "heldout": 4}


def load(split: str, kind: str | None = None) -> list[tuple[Text, str]]:
    """Return the (command, intent) rows of a split ("train" or "heldout"), all or one kind ("direct", "indirect")."""
    if split not in _GENERATED_PER_TEMPLATE or kind not in (None, "direct", "indirect"):
        raise InputError(f"found {split!r} and {kind!r}, expected train or heldout, and direct or indirect")
    folder = files(__package__)
    rows: list[tuple[Text, str]] = []
    for line in folder.joinpath("utterances.tsv").read_text("utf-8").splitlines()[1:]:
        text, label, text_kind, part = line.split("\t")
        if part == split and kind in (None, text_kind):
            rows.append((text, label))
    patterns = json.loads(folder.joinpath("templates.json").read_text("utf-8"))
    draw = random.Random(f"smart-home {split}")
    for label, templates in patterns["intents"].items():
        for template in templates[split]:
            commands = {_fill(template, patterns, draw): None for _ in range(_GENERATED_PER_TEMPLATE[split])}
            if kind in (None, template["kind"]):
                rows.extend((command, label) for command in commands)
    return rows


def _fill(template: dict[str, str], patterns: dict[str, Any], draw: random.Random) -> str:
    text: str = re.sub(r"\{(\w+)\}", lambda slot: draw.choice(patterns["slots"][slot[1]]), template["text"])
    if template["kind"] == "direct":
        text = f"{draw.choice(patterns['prefixes'])}{text}{draw.choice(patterns['suffixes'])}"
    return text
