"""`cascade-rt tune`: from a labelled file and a bundle to thresholds, with what may be promised of them.

texts -> every member's logits (once; kept in a cache) and its cost -> operating points (`thresholds.py`) -> the one
that answers the user's question -> a verdict against each member alone -> the bundle's manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, TUNING, Bundle, file_version, read_bundle, write_manifest
from .cost import member_flops
from .errors import BundleError, InputError, MissingExtraError, TextError
from .gate import confidence, softmax
from .records import Text
from .runtime import CascadeRuntime
from .thresholds import (
    Answers,
    OperatingPoint,
    certify,
    fastest,
    left_at,
    measure,
    most_accurate,
    operating_points,
    pareto_front,
    texts_needed,
)

COSTS = ("layers", "flops", "latency")
FEWEST_TEXTS = 50
_CHUNK = 1024
_TIMED = 100  # texts
_ROUNDS = 3


@dataclass(frozen=True)
class Question:
    """What the user asks: one of the three, or none for the front alone.

    `max_drop`: of accuracy against the last member, as a share; `speedup`: at least so many times faster than the
    last member; `budget_ms`: at most so many milliseconds a text, in the mean or, with `p95`, for 95 of 100.
    `confidence` asks for a guarantee of `max_drop`. `shared`: one tau for all members; `subsets=False`: all members.
    """

    max_drop: float | None = None
    speedup: float | None = None
    budget_ms: float | None = None
    p95: bool = False
    confidence: float | None = None
    cost: str = "layers"
    shared: bool = False
    subsets: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for a question that has no answer."""
        asked = [name for name in ("max_drop", "speedup", "budget_ms") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise InputError(f"found --{' and --'.join(asked).replace('_', '-')}, expected one question at a time")
        for name, lowest, highest, told in (
            ("max_drop", 0.0, 1.0, "a share from 0 to below 1"),
            ("speedup", 1e-9, math.inf, "a number above 0"),
            ("budget_ms", 1e-9, math.inf, "a number above 0"),
            ("confidence", 0.5, 1.0, "a number from 0.5 to below 1"),
            ("seed", 0, 2**32, "a whole number from 0"),
        ):
            value = getattr(self, name)
            if value is not None and not lowest <= value < highest:
                raise InputError(f"found --{name.replace('_', '-')} {value:g}, expected {told}")
        if self.confidence is not None and self.max_drop is None:
            raise InputError("found --confidence alone, expected --max-drop with it: that is what can be guaranteed")
        if self.p95 and self.budget_ms is None:
            raise InputError("found --p95 alone, expected --budget-ms with it")
        if self.cost not in COSTS:
            raise InputError(f"found --cost {self.cost}, expected one of {', '.join(COSTS)}")


@dataclass(frozen=True)
class Collected:
    """What the members answer to the texts, once for each kind of cost: layers, FLOPs and milliseconds."""

    answers: dict[str, Answers]
    digest: str
    labelled: bool

    def take(self, rows: NDArray[np.intp]) -> Collected:
        """Return those of some of the texts."""
        return replace(self, answers={kind: answers.take(rows) for kind, answers in self.answers.items()})


def open_whole(model_dir: str | Path, **settings: Any) -> CascadeRuntime:
    """Return a runtime with all members of a bundle, whatever an earlier tuning chose."""
    names = [member.name for member in read_bundle(model_dir, verify=False).members]
    return CascadeRuntime(model_dir, members=names, **settings)


def collect(
    runtime: CascadeRuntime,
    texts: Sequence[Text],
    labels: NDArray[np.intp] | None,
    *,
    cache: Path | None,
    progress: Callable[[int], object] = lambda _: None,
) -> Collected:
    """Run every member on every text, and time some.

    `labels`: class ids, (texts,), or None to compare with the last member's answers. `cache`: a folder that keeps the
    logits, so that for the next question members run only to be timed; None for none. Raises InputError for
    too few texts and for a class without a text.
    """
    if len(texts) < FEWEST_TEXTS:
        raise InputError(f"found {len(texts)} texts, expected at least {FEWEST_TEXTS} to choose thresholds from")
    names = runtime.bundle.labels
    if labels is not None and (absent := sorted(set(range(len(names))) - set(labels.tolist()))):
        shown = ", ".join(repr(names[index]) for index in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(
            f"found no text of {len(absent)} of the {len(names)} classes ({shown}), expected some of each: accuracy "
            "would say nothing about them; add texts, or leave the labels out (--agreement)"
        )
    logits, lengths = _logits(runtime, texts, cache, progress)
    probabilities = softmax(logits)
    predictions = probabilities.argmax(axis=-1)
    members = runtime.bundle.members
    tokenization, seconds, noise = _latencies(runtime, texts, lengths)
    sure, right = confidence(probabilities), predictions == (predictions[-1] if labels is None else labels)
    nothing = np.zeros(len(texts))
    layers = np.repeat([[float(member.layers)] for member in members], len(texts), axis=1)
    flops = np.stack([member_flops(member, lengths) for member in members])
    written = [None] * len(texts) if labels is None else [names[label] for label in labels.tolist()]
    return Collected(
        {
            "layers": Answers(sure, right, layers, nothing),
            "flops": Answers(sure, right, flops, nothing),
            "latency": Answers(sure, right, 1000 * seconds, 1000 * tokenization, noise),
        },
        _digest(zip(texts, written, strict=True)),
        labels is not None,
    )


def tune(bundle: Bundle, data: Collected, question: Question) -> dict[str, Any]:
    """Answer the question: a report of plain numbers, as `--json` prints it.

    `chosen` is None where no question was asked, or where nothing could be guaranteed; `write_tuning` takes it.
    """
    kind = "latency" if question.budget_ms is not None else question.cost
    answers = data.answers[kind]
    last = len(bundle.members) - 1
    options = {"shared": question.shared, "subsets": question.subsets}
    points = operating_points(answers, **options)
    whole = measure(answers, (last,), ())
    guarantee: dict[str, Any] | None = None
    chosen: OperatingPoint | None = None
    if question.confidence is not None and question.max_drop is not None:
        chosen, guarantee = _guaranteed(answers, question, options)
    elif question.max_drop is not None:
        chosen = fastest(points, whole.accuracy - question.max_drop)
    elif question.speedup is not None:
        if whole.cost / question.speedup < (least := min(point.cost for point in points)):
            raise InputError(
                f"found --speedup {question.speedup:g}, expected at most {whole.cost / least:.2f}: the fastest member's"
            )
        chosen = most_accurate(points, whole.cost / question.speedup)
    elif question.budget_ms is not None:
        chosen = most_accurate(points, question.budget_ms, p95=question.p95)
        if chosen is None:
            least = min(point.cost_p95 if question.p95 else point.cost for point in points)
            raise InputError(
                f"found --budget-ms {question.budget_ms:g}, expected at least {least:.3g}: the fastest member's here"
            )
    report = {
        "question": asdict(question),
        "data": {"texts": len(answers.overhead), "sha256": data.digest},
        "compared_with": "labels" if data.labelled else "the last member's answers",
        "alone": [told(bundle, data, (place,), ()) for place in range(last + 1)],
        "chosen": None if chosen is None else told(bundle, data, chosen.members, chosen.thresholds),
        "guarantee": guarantee,
        "front": [told(bundle, data, point.members, point.thresholds) for point in pareto_front(points)],
    }
    return report | {"verdict": verdict(report)}


def told(bundle: Bundle, data: Collected, members: tuple[int, ...], thresholds: tuple[float, ...]) -> dict[str, Any]:
    """Return what one way to run the bundle does on the data: quality, exits, and speed-ups over its last member.

    `drop_error` is the standard error of `drop`, text by text; what was chosen for its drop does worse on other texts.
    """
    latency = data.answers["latency"]
    point, whole = measure(latency, members, thresholds), measure(latency, (len(bundle.members) - 1,), ())
    place = left_at(latency, members, thresholds)
    rows = np.arange(len(place))
    lost = latency.right[-1].astype(int) - latency.right[list(members)][place, rows]
    speedups = {}
    for kind, answers in data.answers.items():
        executed = answers.overhead + np.cumsum(answers.costs[list(members)], axis=0)
        alone = answers.overhead + answers.costs[-1]
        speedups[f"{kind}_speedup"] = float(alone.sum() / executed[place, rows].sum())
    return {
        "members": [bundle.members[index].name for index in members],
        "thresholds": list(thresholds),
        "accuracy": point.accuracy,
        "drop": whole.accuracy - point.accuracy,
        "drop_error": float(np.std(lost) / math.sqrt(len(lost))),
        "risk": point.risk,
        "exits": np.bincount(place, minlength=len(members)).tolist(),
        **speedups,
        "latency_ms": point.cost,
        "latency_p95_ms": point.cost_p95,
    }


def verdict(report: dict[str, Any]) -> str:
    """Say whether the chosen cascade is worth it, against each member alone at its measured latency."""
    chosen, alone = report["chosen"], report["alone"]
    last = alone[-1]
    if chosen is None and report["guarantee"] is None:
        return "nothing was asked, nothing chosen: these are the best trades"
    if chosen is None:
        return f"do not cascade on this evidence: nothing faster than {last['members'][0]} alone can be guaranteed"
    if chosen["members"] == last["members"]:
        return f"do not cascade: use {last['members'][0]} alone"
    if len(chosen["members"]) == 1:
        return (
            f"do not cascade: use {chosen['members'][0]} alone, {chosen['latency_speedup']:.2f}x as fast as "
            f"{last['members'][0]} here, {_lost(chosen)}"
        )
    for rival in alone:
        if rival["accuracy"] >= chosen["accuracy"] and rival["latency_ms"] <= chosen["latency_ms"]:
            return (
                f"do not cascade: {rival['members'][0]} alone is as accurate ({100 * rival['accuracy']:.2f}%) and as "
                f"fast here ({rival['latency_ms']:.2f} ms against {chosen['latency_ms']:.2f}); ask with --cost latency"
            )
    slower = "do not cascade, ask with --cost latency" if chosen["latency_speedup"] <= 1 else "cascade"
    return f"{slower}: {chosen['latency_speedup']:.2f}x as fast as {last['members'][0]} alone here, {_lost(chosen)}"


def _lost(chosen: dict[str, Any]) -> str:
    points, error = 100 * chosen["drop"], 100 * chosen["drop_error"]
    return f"{abs(points):.2f} (+- {error:.2f}) points of accuracy {'lost' if points >= 0 else 'won'} on these texts"


def write_tuning(folder: Path, bundle: Bundle, report: dict[str, Any]) -> None:
    """Write the chosen members and thresholds, and what is expected of them, into the bundle: whole or not at all.

    Members that are left out get a threshold that no text exceeds, and a chosen last one that is not the bundle's one
    that every text does: whoever runs them all gets the same answers. Raises BundleError where another bundle has
    taken this one's place since it was read.
    """
    if file_version(folder / MANIFEST) != bundle.version:
        raise BundleError(f"{folder}: replaced while it was tuned; tune it again")
    chosen = report["chosen"]
    taus = dict(zip(chosen["members"], [*chosen["thresholds"], 0.0], strict=True))
    *others, last = bundle.members
    members = (*(replace(member, threshold=taus.get(member.name, 1.0)) for member in others), last)
    kept = {key: report[key] for key in ("question", "data", "compared_with", "guarantee", "verdict")}
    tuning = chosen | {"last_alone": {"accuracy": report["alone"][-1]["accuracy"]}} | kept
    write_manifest(folder, replace(bundle, members=members, other={**bundle.other, TUNING: tuning}))


def local_folder(model_dir: str) -> Path:
    """Return the bundle's folder, if one may write there; raise BundleError for one on the hub."""
    folder = Path(model_dir)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{model_dir}: not a folder of yours; tune a copy, or say --dry-run to write nothing")
    return folder


def plotting() -> Any:
    """Return matplotlib's pyplot, drawing into files; raise MissingExtraError where it is not installed."""
    try:
        import matplotlib  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("cascade-rt tune --output", "plot", error) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def draw_front(report: dict[str, Any], path: Path) -> None:
    """Draw the front, each member alone, and the chosen point, as accuracy over speed-up."""
    pyplot = plotting()
    kind = "latency" if report["question"]["budget_ms"] is not None else report["question"]["cost"]
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")

    def draw(points: list[dict[str, Any]], style: str, label: str, size: int) -> None:
        speedups = [point[f"{kind}_speedup"] for point in points]
        axis.plot(speedups, [100 * point["accuracy"] for point in points], style, label=label, markersize=size)

    draw(report["front"], ".-", "front", 4)
    draw(report["alone"], "ks", "one member alone", 5)
    if report["chosen"]:
        draw([report["chosen"]], "r*", "chosen", 13)
    named = "agreement with the last member, %" if report["compared_with"] != "labels" else "accuracy, %"
    axis.set(xlabel=f"speed-up over the last member alone ({kind})", ylabel=named)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def cache_folder() -> Path:
    """Return where logits are kept between questions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade-rt"


def _guaranteed(
    answers: Answers, question: Question, options: dict[str, bool]
) -> tuple[OperatingPoint | None, dict[str, Any]]:
    """Certify on one half of the texts what the other half proposes."""
    confidence, max_risk = question.confidence or 0.0, question.max_drop or 0.0
    rows = np.random.default_rng(question.seed).permutation(len(answers.overhead))
    half = len(rows) // 2
    chosen, certificate, sequence = certify(
        answers.take(rows[:half]), answers.take(rows[half:]), max_risk, confidence, **options
    )
    test = answers.take(rows[half:])  # the other half chose the points: there they look better than they are
    last = measure(test, (len(answers.confidences) - 1,), ())
    promising = []
    for point in sequence:
        seen = measure(test, point.members, point.thresholds)
        needed = texts_needed(seen.risk, max_risk, confidence)
        if needed is not None and needed > certificate.texts and (chosen is None or seen.cost < chosen.cost):
            promising.append({"speedup": last.cost / seen.cost, "risk": seen.risk, "texts": 2 * needed})
    told = promising[:: max(1, len(promising) // 4)]
    return chosen, asdict(certificate) | {"searched_on": half, "with_more_texts": told}


def _logits(
    runtime: CascadeRuntime, texts: Sequence[Text], cache: Path | None, progress: Callable[[int], object]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    bundle = runtime.bundle
    files = [bundle.tokenizer_sha256, *(member.sha256 for member in bundle.members)]
    files += [file.sha256 for member in bundle.members for file in member.data]
    key = _digest([files, bundle.max_length, bundle.pair, *texts])
    kept = None if cache is None else cache / f"logits-{key}.npz"
    if kept is not None and kept.is_file():
        try:
            with kept.open("rb") as stream, np.load(stream) as found:
                progress(len(texts))
                return found["logits"], found["lengths"]
        except Exception:  # cut short by a kill or a full disk, which fails in many ways: made anew
            kept.unlink(missing_ok=True)
    parts, lengths = [], []
    for start in range(0, len(texts), _CHUNK):
        try:
            logits, tokens = runtime.member_logits(texts[start : start + _CHUNK])
        except TextError as error:
            raise TextError(start + error.index, error.reason) from None
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
    """Write the cache's file whole or not at all; a folder that cannot be written is no reason to fail."""
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
    """Return the seconds of tokenization, (texts,), and of each member, (members, texts), of a text that comes alone.

    Some texts of all lengths are timed, alone, the median of several rounds; a line over the length tells the rest.
    Last, how many times the line's seconds the slowest 5% of all single timings took.
    """
    order = np.argsort(lengths, kind="stable")
    sample = order[np.unique(np.linspace(0, len(order) - 1, min(_TIMED, len(order))).astype(int))]
    rounds = []
    for _ in range(1 + _ROUNDS):
        timed = [runtime.member_seconds(texts[row]) for row in sample]
        rounds.append([[tokenization, *members] for tokenization, members in timed])
    seconds = np.median(rounds[1:], axis=0)
    straight = 1 if len(np.unique(lengths[sample])) > 1 else 0
    lines = [np.polynomial.Polynomial.fit(lengths[sample], column, straight) for column in seconds.T]
    told = np.stack([np.maximum(line(lengths), column.min()) for line, column in zip(lines, seconds.T, strict=True)])
    ratios = np.sum(rounds[1:], axis=2) / told[:, sample].sum(axis=0)
    return told[0], told[1:], max(1.0, float(np.quantile(ratios, 0.95)))
