"""What the benchmarks run on: texts, operating points for wanted speed-ups, whole processes; and how spread is told."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from cascade_rt import Bundle, CascadeError
from cascade_rt.gate import confidence, softmax
from cascade_rt.records import Text, read_examples
from cascade_rt.thresholds import threshold_for_speedup

if TYPE_CHECKING:  # an extra that latency.py does without
    from cascade_train.tasks import Examples, TaskData


def read_task(task: str, folder: Path) -> tuple[TaskData, Examples, str]:
    """Return what to learn, what to report on, and what that is: the dev set, or a part of the training file."""
    from cascade_train.tasks import GLUE, hold_out, load_evaluation, load_file, load_task  # noqa: PLC0415 - an extra

    if task in GLUE:
        data, share = load_task(task, folder), 0.15
        if any((folder / file).is_file() for files in GLUE[task].dev.values() for file in files):
            return data, next(iter(load_evaluation(task, folder).values())), "dev"
    else:
        data, share = load_file(folder / "train.csv", columns=("text",), label_column="category"), 0.3
    kept, reported = hold_out(data.train, share, 1, nested=task in GLUE and GLUE[task].nested)
    told = f"{share:.0%} of the training file, held out: there is no dev file"
    return replace(data, train=kept), reported, told


def texts_for(model_dir: Path, bundle: Bundle, data: Path | None, words: str, count: int, seed: int = 0) -> list[Text]:
    """Return `count` texts in random order: from `data`, or made of the tokenizer's words.

    `words` is "MEAN:SD", the (log-normal) distribution of words per made-up text.
    """
    draw = random.Random(seed)
    if data is not None:
        texts = [example.text for example in read_examples(data, pair=bundle.pair)]
        draw.shuffle(texts)
        return (texts * -(-count // len(texts)))[:count]
    pieces = Tokenizer.from_file(str(model_dir / bundle.tokenizer_file)).get_vocab()
    vocabulary = sorted(piece for piece in pieces if len(piece) > 1 and piece.isalpha())
    mean, deviation = map(float, words.split(":"))

    def text() -> str:
        length = max(1, round(mean * draw.lognormvariate(0, deviation / mean)))
        return " ".join(draw.choices(vocabulary, k=length))

    return [(text(), text()) if bundle.pair else text() for _ in range(count)]


def reachable(bundle: Bundle, wanted: list[float]) -> list[float]:
    """Return the layer speed-ups below what the first member alone has."""
    fastest = bundle.members[-1].layers / bundle.members[0].layers
    return [speedup for speedup in wanted if speedup < fastest]


def taus_for(bundle: Bundle, logits: np.ndarray, speedups: list[float]) -> dict[float, float]:
    """Choose the tau that reaches each layer speed-up on the texts of `CascadeRuntime.member_logits`."""
    confidences = confidence(softmax(logits))
    return {speedup: threshold_for_speedup(bundle.members, confidences, speedup) for speedup in speedups}


def spread(values: np.ndarray) -> dict[str, float]:
    """Return median, minimum and maximum of what was measured."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def seconds_of(command: list[str]) -> float:
    """Run a command to its end and return its seconds on the clock."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def peak_memory_mb(command: list[str]) -> float | None:
    """Run a command to its end and return its peak resident memory in MB; None where there is no /proc.

    Looked up while it runs: what the system tells of an ended child includes the parent that it was forked from.
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


def predict_command(bundle: Path, tau: float, text: Text) -> list[str]:
    """Return the command line that answers one text."""
    words = [text] if isinstance(text, str) else list(text)
    command = [sys.executable, "-m", "cascade_rt", "predict", "--model-dir", str(bundle), "--threshold", str(tau)]
    return [*command, "--", *words]


def run_command(main: Callable[[], None]) -> None:
    """Run a benchmark; what its user can mend ends it with one line."""
    try:
        main()
    except CascadeError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
