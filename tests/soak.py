"""Random operations on a runtime for a long time: no answer may differ from a serial reference, and memory stays flat.

    python -m tests.soak --minutes 20 --output soak.json

Operations come from a seeded generator: calls of all sizes, streams, other thresholds and members, threads, forks,
texts that cannot be used, and a bundle that is replaced on disk meanwhile. The reference answers each text alone, by a
plain loop over its members. Bundles are the tiny ones of the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime, InputError, Prediction
from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import write_bundle
from cascade_rt.engine.task import SingleLabel
from cascade_rt.io.writers import write_json

from .toy import WORDS, write_cascade

TASK = SingleLabel()

TOLERANCE = 1e-5
BAD: list[Any] = [None, 3, b"bytes", ("a", "b"), "half \ud83d", ["a"], 1.5, {"text": "a"}]


class Soak:
    """The bundles, the reference, and what was seen."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.sources = [write_cascade(folder / f"source-{number}", shift=10 * number) for number in range(2)]
        self.bundle = shutil.copytree(self.sources[0], folder / "bundle")
        pieces = [*WORDS, "naïve", "東京", "...", "\n", "don't", "\u202e"]
        self.texts = ["", *(" ".join(self.draw.choices(pieces, k=self.draw.randint(1, 60))) for _ in range(400))]
        self.reference = [self._reference(source) for source in self.sources]
        self.current = 0
        self.runtime = self._open()
        self.done: Counter[str] = Counter()
        self.compared = 0

    def _open(self) -> CascadeRuntime:
        return CascadeRuntime(self.bundle, threads=1, preload=True)

    def _reference(self, source: Path) -> NDArray[np.float64]:
        """Return the probabilities of all members, (members, texts, labels), each text alone."""
        with CascadeRuntime(source, threads=1) as runtime:
            return np.concatenate([TASK.probabilities(runtime.member_logits([text])[0]) for text in self.texts], axis=1)

    def rows(self, most: int) -> list[int]:
        """Draw texts."""
        return [self.draw.randrange(len(self.texts)) for _ in range(self.draw.randint(1, most))]

    def check(self, runtime: CascadeRuntime, which: int, rows: Sequence[int], answers: Sequence[Prediction]) -> None:
        """Compare answers with a plain loop over the reference."""
        names = [member.name for member in runtime.bundle.members]
        places = [place for place, name in enumerate(("tiny", "small", "big")) if name in names]
        assert len(answers) == len(rows)
        for row, answer in zip(rows, answers, strict=True):
            for exit, place in enumerate(places):
                probabilities = self.reference[which][place, row]
                last = exit == len(places) - 1
                sure = float(probabilities.max())
                if not last and abs(sure - runtime.thresholds[exit]) < TOLERANCE:
                    break  # either exit is right
                if last or sure > runtime.thresholds[exit]:
                    assert answer.exit == exit, (row, answer, exit)
                    assert np.abs(np.array(answer.probabilities) - probabilities).max() <= TOLERANCE, (row, answer)
                    break
            self.compared += 1

    def predict(self) -> None:
        """One call."""
        rows = self.rows(self.draw.choice([1, 8, 200]))
        self.check(self.runtime, self.current, rows, self.runtime.predict([self.texts[row] for row in rows]))

    def stream(self) -> None:
        """A stream in chunks."""
        rows = self.rows(500)
        size = self.draw.randint(1, 100)
        answers = list(self.runtime.predict_iter((self.texts[row] for row in rows), chunk_size=size))
        self.check(self.runtime, self.current, rows, answers)

    def thresholds(self) -> None:
        """Other thresholds."""
        taus = [round(self.draw.random(), 3) for _ in range(len(self.runtime.bundle.members) - 1)]
        other, rows = self.runtime.with_thresholds(taus), self.rows(60)
        self.check(other, self.current, rows, other.predict([self.texts[row] for row in rows]))

    def members(self) -> None:
        """Other members."""
        kept = sorted(self.draw.sample(range(3), self.draw.randint(1, 3)))
        other, rows = self.runtime.with_members([("tiny", "small", "big")[place] for place in kept]), self.rows(60)
        self.check(other, self.current, rows, other.predict([self.texts[row] for row in rows]))

    def threads(self) -> None:
        """Many threads at once."""
        parts = [self.rows(40) for _ in range(16)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda rows: self.runtime.predict([self.texts[row] for row in rows]), parts))
        for rows, found in zip(parts, answers, strict=True):
            self.check(self.runtime, self.current, rows, found)

    def fork(self) -> None:
        """A child process, forked, with a runtime of its own from a pickle."""
        rows, pickled = self.rows(20), pickle.dumps(self.runtime)
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            status = 1
            try:
                with pickle.loads(pickled) as own:
                    self.check(own, self.current, rows, own.predict([self.texts[row] for row in rows]))
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "a forked child answered otherwise"

    def bad(self) -> None:
        """A text that cannot be used, among others."""
        texts: list[Any] = [self.texts[row] for row in self.rows(10)]
        texts.insert(self.draw.randint(0, len(texts)), self.draw.choice(BAD))
        try:
            self.runtime.predict(texts)
        except InputError:
            return
        raise AssertionError(f"accepted {texts}")

    def replace(self) -> None:
        """Another bundle takes this one's place on disk; the old runtime still answers as before."""
        old, before = self.runtime, self.current
        self.current = 1 - before
        with write_bundle(self.bundle, overwrite=True) as fresh:
            shutil.copytree(self.sources[self.current], fresh, dirs_exist_ok=True)
        rows = self.rows(40)
        self.check(old, before, rows, old.predict([self.texts[row] for row in rows]))
        self.runtime = self._open()
        old.close()
        self.predict()


def memory_mb() -> float:
    """Return the resident memory of this process, without what the C library keeps of freed blocks."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Run, print and check the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the summary and the machine, as JSON")
    options = parser.parse_args()
    weights = {
        "predict": 30,
        "stream": 8,
        "thresholds": 12,
        "members": 8,
        "threads": 4,
        "fork": 1,
        "bad": 6,
        "replace": 2,
    }
    with tempfile.TemporaryDirectory(prefix="cascade-soak-") as folder:
        soak = Soak(Path(folder), options.seed)
        started, samples = time.monotonic(), list[float]()
        seconds = 60 * options.minutes
        while (elapsed := time.monotonic() - started) < seconds:
            (name,) = soak.draw.choices(list(weights), list(weights.values()))
            getattr(soak, name)()
            soak.done[name] += 1
            if elapsed > 0.2 * seconds + len(samples):  # the first fifth warms up; then once a second
                samples.append(memory_mb())
    quarter = max(1, len(samples) // 4)
    first, last = float(np.median(samples[:quarter])), float(np.median(samples[-quarter:]))
    summary = {
        "machine": describe(),
        "minutes": options.minutes,
        "seed": options.seed,
        "operations": dict(soak.done),
        "answers_compared": soak.compared,
        "memory_mb": {"first quarter": round(first, 1), "last quarter": round(last, 1)},
    }
    print(json.dumps(summary, indent=2))
    if options.output:
        write_json(options.output, summary)
    if last > 1.05 * first:
        sys.exit(f"memory grew by {100 * (last / first - 1):.1f}%, over 5%")


if __name__ == "__main__":
    main()
