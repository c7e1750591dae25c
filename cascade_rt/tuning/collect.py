"""Every member's answers to the tuning texts, with three kinds of cost: layers, FLOPs and milliseconds.

Logits are cached, so the next question about the same texts runs members only to time them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import read_bundle
from ..engine.cost import text_flops, windows_of
from ..engine.exit_rules import ExitRule
from ..engine.windows import Windows
from ..errors import InputError, TextError
from ..runtime import CascadeRuntime
from ..types import Text, Trace
from .operating_points import Recorded

FEWEST_TEXTS = 50
_CHUNK = 1024
_TIMED = 100  # texts
_ROUNDS = 3


@dataclass(frozen=True)
class Collected:
    """The members' answers to the texts, once for each kind of cost: layers, FLOPs and milliseconds."""

    answers: dict[str, Recorded]
    digest: str
    """sha256 of texts and labels."""
    labelled: bool
    windows: Windows | None = None
    """The way in which long texts were read; None where they were cut."""

    def take(self, rows: NDArray[np.intp]) -> Collected:
        """Return the answers to some of the texts."""
        return replace(self, answers={kind: answers.take(rows) for kind, answers in self.answers.items()})


def open_whole(model_dir: str | Path, **settings: Any) -> CascadeRuntime:
    """Return a runtime with all members of a bundle, whatever an earlier tuning chose."""
    names = [member.name for member in read_bundle(model_dir, verify=False).members]
    return CascadeRuntime(model_dir, members=names, **settings)


def check_thresholds(rule: ExitRule) -> None:
    """Raise InputError for an exit rule without thresholds."""
    if rule.parameter != "thresholds":
        raise InputError(f"found a bundle with the exit rule {rule.kind}, expected one with thresholds")


def collect(
    runtime: CascadeRuntime,
    texts: Sequence[Text],
    labels: NDArray[Any] | None,
    *,
    cache: Path | None,
    progress: Callable[[int], object] = lambda _: None,
) -> Collected:
    """Run every member on every text, and time some texts.

    `labels`: right answers as the task gives them (see `evaluation.true_answers`), or None to compare with the last
    member's. `cache`: folder to cache logits in, None for no cache. Raises InputError for too few texts, and for a
    class without a text.
    """
    if len(texts) < FEWEST_TEXTS:
        raise InputError(f"found {len(texts)} texts, expected at least {FEWEST_TEXTS} to choose thresholds from")
    names, task, rule = runtime.bundle.labels, runtime.task, runtime.exit_rule
    known = None if labels is None else task.indicators(labels, len(names))
    if known is not None and (absent := np.flatnonzero(~known.any(axis=0)).tolist()):
        shown = ", ".join(repr(names[index]) for index in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(
            f"found no text of {len(absent)} of the {len(names)} classes ({shown}), expected some of each: accuracy "
            "would say nothing about them; add texts, or measure agreement with the last member"
        )
    logits, lengths = _logits(runtime, texts, cache, progress)
    probabilities = task.probabilities(logits)
    answers = task.answers(probabilities)
    members = runtime.bundle.members
    tokenization, seconds, noise = _latencies(runtime, texts, lengths)
    window = runtime.plan.window
    each = windows_of(lengths, window).astype(np.float64)
    layers = np.array([[float(member.layers)] for member in members]) * each
    complete = runtime.bundle.chains == list(range(len(members)))
    by_layers = Recorded(
        rule,
        rule.observed(task, probabilities),
        task.equal(answers, answers[-1] if labels is None else labels),
        costs=layers,
        overhead=np.zeros(len(texts)),
        chains=None if complete else runtime.bundle.chains,
        expected=None if labels is None else task.probability_of(answers, probabilities[-1]),
    )
    flops = np.stack([text_flops(member, lengths, window) for member in members])
    return Collected(
        {
            "layers": by_layers,
            "flops": replace(by_layers, costs=flops),
            "latency": replace(by_layers, costs=1000 * seconds, overhead=1000 * tokenization, noise=noise),
        },
        _digest(zip(texts, _written(labels, names, len(texts)), strict=True)),
        labels is not None,
        runtime.plan.windows,
    )


def _written(labels: NDArray[Any] | None, names: Sequence[str], texts: int) -> list[Any]:
    """Return the label of each text by name, or a list of those that it has, or None."""
    if labels is None:
        return [None] * texts
    if labels.ndim == 1:
        return [names[label] for label in labels.tolist()]
    return [[name for name, has in zip(names, row, strict=True) if has] for row in labels.tolist()]


def _logits(
    runtime: CascadeRuntime, texts: Sequence[Text], cache: Path | None, progress: Callable[[int], object]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    bundle = runtime.bundle
    files = [bundle.tokenizer_sha256, *(member.sha256 for member in bundle.members)]
    files += [file.sha256 for member in bundle.members for file in member.data]
    windows = [] if runtime.plan.windows is None else [asdict(runtime.plan.windows)]
    key = _digest([files, bundle.max_length, bundle.pair, *windows, *texts])
    kept = None if cache is None else cache / f"logits-{key}.npz"
    if kept is not None and kept.is_file():
        try:
            with kept.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
                progress(len(texts))
                return found["logits"], found["lengths"]
        except Exception:  # truncated by a kill or a full disk, which fails in many ways: compute it again
            kept.unlink(missing_ok=True)
    parts, lengths = [], []
    for start in range(0, len(texts), _CHUNK):
        try:
            logits, tokens = runtime.member_logits(texts[start : start + _CHUNK])
        except TextError as error:
            raise TextError(start + error.index, error.reason) from error
        parts.append(logits)
        lengths.append(tokens)
        progress(len(tokens))
    found_logits, found_lengths = np.concatenate(parts, axis=1), np.concatenate(lengths)
    if kept is not None:
        _keep(kept, found_logits, found_lengths)
    return found_logits, found_lengths


def _digest(rows: Iterable[object]) -> str:
    """Return the sha256 of rows as lines of JSON, for data [text, label name] or [[text, text pair], label name]."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode("ascii") + b"\n")
    return digest.hexdigest()


def _keep(path: Path, logits: NDArray[np.float32], lengths: NDArray[np.intp]) -> None:
    """Write the cache's file atomically; a folder that cannot be written is not an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.savez(stream, logits=logits, lengths=lengths)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _latencies(
    runtime: CascadeRuntime, texts: Sequence[Text], lengths: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Estimate the seconds of each text when it is predicted alone.

    Returns the time of tokenization, (texts,), the time of each member, (members, texts), and the noise: measured p95
    over fitted time. What `predict` takes besides is shared equally among the members. A sample of texts of all
    lengths is timed, one at a time, the median of several rounds; a line over the length gives the other texts.
    """
    traces: list[Trace] = []
    every_member = runtime.without_exits().with_trace(traces.append)
    order = np.argsort(lengths, kind="stable")
    sample = order[np.unique(np.linspace(0, len(order) - 1, min(_TIMED, len(order))).astype(int))]

    def timed(text: Text) -> list[float]:
        started = perf_counter()
        every_member.predict([text])
        total = perf_counter() - started
        trace = traces.pop()
        members = [0.0] * len(runtime.bundle.members)
        for run in trace.runs:  # several of a member where a text has many windows
            members[run.stage] += run.seconds
        rest = (total - trace.tokenization_seconds - sum(members)) / len(members)
        return [trace.tokenization_seconds, *(seconds + rest for seconds in members)]

    rounds = [[timed(texts[row]) for row in sample] for _ in range(1 + _ROUNDS)][1:]  # the first warms up
    seconds = np.median(rounds, axis=0)
    degree = 1 if len(np.unique(lengths[sample])) > 1 else 0
    domain = [0, lengths.max()]  # by default that of the sample, of which numpy 1 makes NaN where all are equal
    lines = [np.polynomial.Polynomial.fit(lengths[sample], column, degree, domain) for column in seconds.T]
    fitted = np.stack([np.maximum(line(lengths), column.min()) for line, column in zip(lines, seconds.T, strict=True)])
    ratios = np.sum(rounds, axis=2) / fitted[:, sample].sum(axis=0)
    return fitted[0], fitted[1:], max(1.0, float(np.quantile(ratios, 0.95)))
