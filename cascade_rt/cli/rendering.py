"""Reports as text for a terminal: each function takes a typed report and returns lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import BATCH_TOLERANCE, TUNING, Bundle, MemberEntry
from ..bundle.card import first_labels
from ..bundle.manifest import SINGLE_LABEL
from ..bundle.precisions import PRECISIONS
from ..engine.drift import SIGNIFICANT
from ..engine.memory import PROCESS, available_memory, needed_memory
from ..types import Stats

if TYPE_CHECKING:  # `predict` renders without loading what it does not run
    from ..tuning.evaluation import Evaluation
    from ..tuning.report import Choice, Guarantee, TuningReport

_COSTS = {"layers": "layers", "flops": "FLOPs", "latency": "latency"}  # as columns
_QUALITY = ("accuracy", "drop", "estimated", "risk")  # as columns
_TUNED = ("accuracy", "drop", "estimated_drop", "layers_speedup", "latency_speedup")


def printable(text: str, keep: str = "\n") -> str:
    """Return text that is safe to print for people: control and format characters are escaped, but those of `keep`.

    Labels, member names and texts come from files, and an escape sequence among them would be obeyed by a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Return a share in percent, "-" for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def times(ratio: float | None) -> str:
    """Return a speed-up ratio, "-" for one that has no meaning."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def exits_line(stats: Stats) -> str:
    """Return exits, layers, and whether the texts are still of the kind of tuning, in one line."""
    if not stats.texts:
        return "0 texts"
    exits = _rates([count / stats.texts for count in stats.exits])
    line = f"{stats.texts} text{'s' * (stats.texts != 1)}, exits {exits}, {stats.mean_layers:.2f} layers per text"
    if stats.tuned_rates is None or stats.p_value is None or stats.distance is None:
        return line
    line += f"; when tuned {_rates(stats.tuned_rates)}: distance {stats.distance:.3f}, p = {stats.p_value:.4f}"
    return line + (", the texts have changed: tune again" if stats.p_value < SIGNIFICANT else "")


def bundle_summary(bundle: Bundle) -> str:
    """Return labels, members and tuning of a bundle."""
    lines = [
        f"labels      {len(bundle.labels)}: {printable(first_labels(bundle), keep='')}",
        f"texts       {'pairs' if bundle.pair else 'single'}, up to {bundle.max_length} tokens",
    ]
    if bundle.task != SINGLE_LABEL:
        lines.append(f"task        {bundle.task}, cuts {_cuts(bundle)}")
    if not bundle.is_cascade:
        settings = _settings(bundle.exit_rule)
        lines.append(f"exit rule   {bundle.exit_rule['kind']}" + (f" ({settings})" if settings else ""))
    lines.append(
        table(
            ["member", "layers", "hidden", "parameters", "precision", "batch-invariant", "size", "threshold"],
            [
                [
                    member.name,
                    str(member.layers),
                    str(member.hidden_size),
                    f"{member.parameters / 1e6:.1f}M",
                    member.precision,
                    _batch_invariant(member),
                    f"{_size(bundle, member) / 1e6:.1f} MB",
                    "-" if member.threshold is None else f"{member.threshold:.4f}",
                ]
                for member in bundle.members
            ],
        )
    )
    for member in bundle.members:
        if _batch_invariant(member) == "no":
            difference = _share(member.other.get("batch_difference"))
            lines.append(
                f"{member.name}: the score of a text, and so its exit, depends on the other texts of its batch"
                + ("" if difference is None else f" (by up to {difference:.1e} where it was measured)")
                + "; the precision int8 is batch-invariant"
            )
    if bundle.tuning is not None:
        lines += _tuned(bundle.other[TUNING])
    return "\n".join(lines)


def memory_line(bundle: Bundle) -> str:
    """Return how much memory and disk a bundle needs."""
    needed, first = needed_memory(bundle), bundle.members[0].name
    disk = sum(_size(bundle, member) for member in bundle.members)
    return (
        f"memory about {needed.first / 1e6:.0f} MB for texts that leave at {first}, {needed.all / 1e6:.0f} MB for all "
        f"members, {needed.bulk / 1e6:.0f} MB for many texts at a time; disk {disk / 1e6:.1f} MB, and about 1.5 "
        "times as much for members kept as prepared"
    )


def too_little_memory(bundle: Bundle) -> str | None:
    """Return a warning where this process may not take as much memory as all members need; None otherwise."""
    there = available_memory()
    if there is None or there >= PROCESS + sum(_size(bundle, member) for member in bundle.members):
        return None
    if there >= (needed := needed_memory(bundle).all):
        return None
    return (
        f"this process may take {there / 1e6:.0f} MB here, and all members need about {needed / 1e6:.0f} MB; use fewer "
        "members, or export them in int8 or with a trimmed vocabulary"
    )


def _cuts(bundle: Bundle) -> str:
    low, high = min(bundle.cuts, default=0.5), max(bundle.cuts, default=0.5)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def evaluation_summary(report: Evaluation, seconds: Sequence[float] | None = None) -> str:
    """Return the quality of each member and of the cascade, and the seconds per text of each if they were measured."""
    cascade = report.cascade
    rows = [
        (member.name, str(member.layers), count, member)
        for member, count in zip(report.members, cascade.exits, strict=True)
    ]
    cells = [
        [name, layers, str(count), *map(percent, (quality.accuracy, quality.f1, quality.dis, quality.ece))]
        for name, layers, count, quality in [
            *rows,
            ("cascade", f"{cascade.mean_layers:.2f}", sum(cascade.exits), cascade),
        ]
    ]
    header = ["", "layers", "exits", "accuracy", "F1", "DIS", "ECE"]
    if cascade.f1_micro is not None:
        header.append("micro F1")
        for row, quality in zip(cells, [*report.members, cascade], strict=True):
            row.append(percent(quality.f1_micro))
    if seconds is not None:
        header += ["ms per text", "speed-up"]
        for row, own in zip(cells, seconds, strict=True):
            row += [f"{1000 * own:.2f}", f"{seconds[-2] / own:.2f}x"]
    lines = table(header, cells)
    taus = ", ".join(f"{tau:.4f}" for tau in cascade.thresholds) or "none"
    clock = "" if seconds is None else f"speed-up on the clock {seconds[-2] / seconds[-1]:.2f}x, "
    if report.by_label is not None:
        lines = f"{_label_table(report)}\n\n{lines}"
    return (
        f"{lines}\n{report.texts} texts, thresholds {taus}; {clock}layer speed-up {times(cascade.layer_speedup)}, "
        f"FLOPs speed-up {times(cascade.flops_speedup)}; figures in %, F1 {report.f1}"
    )


def _label_table(report: Evaluation) -> str:
    header = ["label", "texts", "precision", "recall", "F1", *(f"F1 of {member.name}" for member in report.members)]
    return table(
        header,
        [
            [row.label, str(row.texts), *map(percent, (row.precision, row.recall, row.f1, *row.members))]
            for row in report.by_label or []
        ],
    )


def tuning_summary(report: TuningReport) -> str:
    """Return the front, each member alone, the chosen point, the guarantee and the verdict."""
    rows = [("", choice) for choice in report.trade_offs()] + [("alone", choice) for choice in report.alone]
    rows += [("chosen", report.chosen)] if report.chosen else []
    lines = [
        table(
            ["", "members", "thresholds", *_QUALITY, *_COSTS.values(), "mean ms", "p95 ms"],
            [[name, *_choice_cells(choice)] for name, choice in rows],
        ),
        f"{report.data.texts} texts, compared with {report.compared_with}; accuracy, drop and risk in %; "
        "estimated: the drop expected on other texts, which objectives use",
    ]
    if report.guarantee:
        lines.append(_guarantee(report.guarantee))
    return "\n".join([*lines, f"verdict: {report.verdict}"])


def latency_summary(report: Mapping[str, Any]) -> str:
    """Return the table of `measure_latency`'s report, which is plain JSON."""
    lines = [
        f"{' + '.join(report['bundle']['members'])} on {report['machine']['processor']}, {report['threads']} threads"
    ]
    rows = []
    for size, contestants in report["batches"].items():
        for name, row in contestants.items():
            cells = [f"{row['ms_per_call'][quantile]:.2f}" for quantile in ("p50", "p95", "p99")]
            cells.append(f"{row['texts_per_second']['median']:.1f}")
            if name == "big":
                rows.append([size, name, "1.00x", "1.00x", "1.00x", "", *cells])
                continue
            realised = "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["realised"]) if row["realised"] else "-"
            ratios = [row["layer_speedup"], row["flops_speedup"], row["wall_speedup"]["median"]]
            rows.append([size, f"{name}x", *map(times, ratios), realised, *cells])
    header = ["batch", "", "layers", "FLOPs", "wall", "realised", "p50 ms", "p95 ms", "p99 ms", "texts/s"]
    lines.append(table(header, rows))
    for size, ratio in report["overhead"].items():
        lines.append(f"predict over its tokenizer and ONNX Runtime calls, batch {size}: {ratio['median']:.3f}")
    for size, parts in report["first_member"].items():
        tokenization, beyond, ratio = (part["median"] for part in parts.values())
        lines.append(
            f"a text that leaves at the first member, batch {size}: tokenization {tokenization:.3f} ms, "
            f"beyond it {beyond:.3f} ms, in all {ratio:.2f} times the tokenization"
        )
    for name, row in report["cold_start"].items():
        memory = "" if row["peak_memory_mb"] is None else f", peak {row['peak_memory_mb']} MB"
        lines.append(f"cold start, {name}: {row['seconds']['median']:.2f} s{memory}")
    return "\n".join(lines)


def _choice_cells(choice: Choice) -> list[str]:
    return [
        "+".join(choice.members),
        " ".join(f"{tau:.4f}" for tau in choice.thresholds)
        or (not choice.alone and _settings(choice.exit_rule))
        or "-",
        *map(percent, (choice.accuracy, choice.drop, choice.estimated_drop, choice.risk)),
        *(times(choice.speedup(cost)) for cost in _COSTS),
        f"{choice.latency_ms:.2f}",
        f"{choice.latency_p95_ms:.2f}",
    ]


def _settings(exit_rule: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in exit_rule.items() if key != "kind")


def _guarantee(found: Guarantee) -> str:
    tested = (
        f"{found.losses} of {found.texts} texts lost, p = {found.p_value:.3g}, upper bound {100 * found.bound:.2f}%"
    )
    if found.certified:
        line = f"guarantee: {_promise(found.confidence, found.max_risk)} ({tested})"
    elif found.tested:
        line = f"no guarantee of {100 * found.max_risk:g} points: the most careful cascade tried has {tested}"
    else:
        line = "no guarantee: nothing is faster than the last member alone"
    for row in found.with_more_texts:
        line += (
            f"\n  {times(row.speedup)} could be certified with a file of about {row.texts} texts, if its risk stays "
            f"{100 * row.risk:.2f}%"
        )
    return line


def _promise(confidence: object, max_risk: object) -> str:
    return (
        f"with confidence {confidence} at most a share of {max_risk} of such texts is answered wrongly by the cascade "
        "but rightly by the last member, so accuracy drops by no more"
    )


def _tuned(tuning: Mapping[str, Any]) -> list[str]:
    """Return what the manifest says about tuning; other writers may leave keys out."""
    numbers = [f"{name} {tuning[name]:.4g}" for name in _TUNED if isinstance(tuning.get(name), int | float)]
    exits = [count / sum(tuning["exits"]) for count in tuning["exits"]]
    lines = ["tuned       " + ", ".join([" + ".join(tuning["members"]), f"exits {_rates(exits)}", *numbers])]
    data = tuning.get("data")
    if isinstance(data, dict) and "stride" in data:
        lines.append(f"long texts  tuned with the stride {data['stride']} and the aggregate {data.get('aggregate')}")
    guarantee = tuning.get("guarantee")
    if isinstance(guarantee, dict) and guarantee.get("certified"):
        lines.append(f"guarantee   {_promise(guarantee.get('confidence'), guarantee.get('max_risk'))}")
    return lines


def _rates(rates: Sequence[float]) -> str:
    return " / ".join(f"{100 * rate:.1f}%" for rate in rates)


def _batch_invariant(member: MemberEntry) -> str:
    """Return what the export measured: yes, no, or ? if it did not."""
    difference = _share(member.other.get("batch_difference"))
    if not PRECISIONS[member.precision].batch_invariant or (difference is not None and difference > BATCH_TOLERANCE):
        return "no"
    return "?" if difference is None else "yes"


def _share(value: object) -> float | None:
    """Return a number from 0 to 1 of a manifest; None for anything else."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _size(bundle: Bundle, member: MemberEntry) -> int:
    return member.size((bundle.folder or Path()) / member.file)
