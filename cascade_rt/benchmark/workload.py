"""Inputs of benchmarks: texts, operating points for given speed-ups, whole processes; and the spread of figures."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from tokenizers import Tokenizer

from ..bundle import Bundle
from ..engine.cost import whole_model
from ..errors import InputError, InvalidOption
from ..io.readers import AS_USUAL, Reading, read_examples
from ..runtime import CascadeRuntime
from ..tuning.operating_points import threshold_for_speedup
from ..types import Text


@dataclass(frozen=True)
class Workload:
    """The calls to measure: texts, the speed-ups to aim at, and how many texts a call has.

    Raises InvalidOption for a value out of range.
    """

    data: Path | None = None
    """File of texts; None for synthetic ones."""
    reading: Reading = AS_USUAL
    """Format and columns of `data`."""
    words: str = "16:8"
    """Words per synthetic text, "MEAN:SD"."""
    count: int = 256
    """Number of texts."""
    speedups: Sequence[float] = (1.5, 2, 3, 4, 5)
    """Layer speed-ups to aim at."""
    batch_sizes: Sequence[int] = (1, 8, 32)
    """Texts per call; all at once are measured too."""
    rounds: int = 5
    """After one that warms up."""

    def __post_init__(self) -> None:
        """Check the numbers that the measurement counts by."""
        for field, least in (("rounds", self.rounds), ("batch_sizes", min(self.batch_sizes, default=1))):
            if least < 1:
                raise InvalidOption(field, least, "at least 1")


class Spread(TypedDict):
    """The spread of some measurements."""

    median: float
    min: float
    max: float


def texts_for(
    bundle: Bundle, data: Path | None, words: str, count: int, seed: int = 0, reading: Reading = AS_USUAL
) -> list[Text]:
    """Return `count` texts in random order: from `data`, or synthetic ones from the tokenizer's words.

    `words` is "MEAN:SD", the (log-normal) distribution of words per synthetic text.
    """
    if count < 1:
        raise InvalidOption("count", count, "at least 1")
    draw = random.Random(seed)
    if data is not None:
        texts = [example.text for example in read_examples(data, reading, pair=bundle.pair)]
        if not texts:
            raise InputError(f"{data}: found no texts, expected at least one")
        draw.shuffle(texts)
        return (texts * -(-count // len(texts)))[:count]
    try:
        mean, deviation = map(float, words.split(":"))
        spread_of_words = deviation / mean
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidOption("words", words, "MEAN:SD, for instance 16:8") from error
    pieces = Tokenizer.from_file(str((bundle.folder or Path()) / bundle.tokenizer_file)).get_vocab()
    vocabulary = sorted(piece for piece in pieces if len(piece) > 1 and piece.isalpha())

    def text() -> str:
        length = max(1, round(mean * draw.lognormvariate(0, spread_of_words)))
        return " ".join(draw.choices(vocabulary, k=length))

    return [(text(), text()) if bundle.pair else text() for _ in range(count)]


def reachable(bundle: Bundle, wanted: list[float]) -> list[float]:
    """Return the layer speed-ups below that of the first member alone."""
    whole = sum(member.layers for member in whole_model(bundle.members))
    return [speedup for speedup in wanted if speedup * bundle.members[0].layers < whole]


def taus_for(runtime: CascadeRuntime, logits: np.ndarray, speedups: list[float]) -> dict[float, float]:
    """Return the tau that reaches each layer speed-up, from the logits of `CascadeRuntime.member_logits`."""
    scores = runtime.exit_rule.observed(runtime.task, runtime.task.probabilities(logits))
    return {speedup: threshold_for_speedup(runtime.bundle.members, scores, speedup) for speedup in speedups}


def spread(values: np.ndarray) -> Spread:
    """Return median, minimum and maximum of some measurements."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def seconds_of(command: list[str]) -> float:
    """Run a command to its end and return its seconds on the clock."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def peak_memory_mb(command: list[str]) -> float | None:
    """Run a command to its end and return its peak resident memory in MB; None where there is no /proc.

    It is read while the command runs: the system's figure for an ended child includes the parent it was forked from.
    """
    peak = None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            except OSError:
                break
            if lines:
                peak = int(lines[0].split()[1]) / 1024
            time.sleep(0.002)
    return peak and round(peak, 1)


def predict_command(bundle: str | Path, tau: float, text: Text, options: Sequence[str] = ()) -> list[str]:
    """Return the command line that answers one text with these further options."""
    words = [text] if isinstance(text, str) else list(text)
    command = [sys.executable, "-m", "cascade_rt", "predict", "--model-dir", str(bundle), "--threshold", str(tau)]
    return [*command, *options, "--", *words]
