"""The built-in demo task: three balanced parts, and no phrasing in two of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product

import pytest
from cascade_train import smart_home
from cascade_train.smart_home import KINDS, LABELS, SPLITS

from cascade_rt.errors import InputError

LEAST_ROWS = {"train": 3500, "tuning": 600, "heldout": 600}
LEAST_PATTERNS = {"train": 60, "tuning": 12, "heldout": 12}

Phrasing = tuple[str, ...]


@pytest.mark.parametrize("split", SPLITS)
def test_every_part_is_large_and_balanced(split: str) -> None:
    rows = smart_home.load(split)
    assert len(rows) >= LEAST_ROWS[split]
    sizes = Counter(label for _, label in rows)
    assert set(sizes) == set(LABELS)
    assert len(set(sizes.values())) == 1
    of_kind = [smart_home.load(split, kind) for kind in KINDS]
    assert sorted(of_kind[0] + of_kind[1]) == sorted(rows)
    for part in of_kind:
        assert {label for _, label in part} == set(LABELS)
        assert len(part) >= 0.35 * len(rows)


def test_every_part_has_many_patterns_of_every_intent_and_kind() -> None:
    patterns, _, _ = smart_home.templates()
    counts = Counter((pattern.split, pattern.label, pattern.kind) for pattern in patterns)
    for split, label, kind in product(SPLITS, LABELS, KINDS):
        assert counts[split, label, kind] >= LEAST_PATTERNS[split], (split, label, kind)


def test_no_command_occurs_twice_within_or_across_parts() -> None:
    texts = Counter(str(text).lower() for split in SPLITS for text, _ in smart_home.load(split))
    assert not [text for text, count in texts.items() if count > 1]


def test_generation_is_seeded_and_fills_every_slot() -> None:
    for split in SPLITS:
        rows = smart_home.load(split)
        assert smart_home.load(split) == rows
        assert not [text for text, _ in rows if re.search(r"[{}|\t]", str(text))]


def test_an_unknown_part_or_kind_is_refused() -> None:
    with pytest.raises(InputError, match="expected train, tuning, heldout"):
        smart_home.load("test")
    with pytest.raises(InputError, match="direct or indirect"):
        smart_home.load("train", "rude")


def test_the_module_prints_a_part() -> None:
    command = [sys.executable, "-m", "cascade_train.smart_home", "tuning", "direct"]
    printed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.splitlines()
    assert printed == ["text\tlabel", *(f"{text}\t{label}" for text, label in smart_home.load("tuning", "direct"))]


def test_no_phrasing_occurs_in_two_parts() -> None:
    """Whatever fills the slots: no hand-written sentence or pattern of a part occurs in another one.

    Within an intent none is even one word away (of those longer than three words), whatever the kind.
    """
    patterns, slots, _ = smart_home.templates()
    fillings = sorted({value.lower() for values in slots.values() for value in values}, key=len, reverse=True)
    slot = re.compile(r"\{\w+\}|\b(" + "|".join(map(re.escape, fillings)) + r")\b")
    parts: dict[tuple[str, Phrasing], set[tuple[str, str]]] = defaultdict(set)
    for row in [*smart_home.utterances(), *patterns]:
        for text in written_out(row.text):
            phrasing = tuple(re.findall(r"[a-z0-9']+|_", slot.sub("_", text.lower())))
            parts["any intent", phrasing].add((row.split, row.text))
            for key in (phrasing, *one_word_less(phrasing)):
                parts[row.label, key].add((row.split, row.text))
    for key, rows in parts.items():
        assert len({split for split, _ in rows}) == 1, (key, rows)


def written_out(text: str) -> Iterator[str]:
    """Write out every `{this|that}`."""
    pieces = re.split(r"\{([^{}]*\|[^{}]*)\}", text)
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return map("".join, product(*choices))


def one_word_less(phrasing: Phrasing) -> list[Phrasing]:
    """Two phrasings that differ in a word share one of these (or one is among the other's)."""
    if len(phrasing) <= 3:
        return []
    return [phrasing[:place] + phrasing[place + 1 :] for place in range(len(phrasing))]
