"""Transformers 4 and 5: names that differ, and what both say on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

MAJOR = int(version("transformers").partition(".")[0])
"""The major version of transformers that is installed."""


def training_arguments(*, warmup_ratio: float, group_by_length: bool, **others: Any) -> TrainingArguments:
    """Return the Trainer's arguments; `warmup_ratio` is a share of all steps, 0 to 1."""
    if MAJOR < 5:
        return TrainingArguments(warmup_ratio=warmup_ratio, group_by_length=group_by_length, **others)
    return TrainingArguments(
        warmup_steps=min(warmup_ratio, math.nextafter(1, 0)),  # from 1 it counts steps
        train_sampling_strategy="group_by_length" if group_by_length else "random",
        **others,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress and lists of weights that are new or left out: what matters is checked here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
