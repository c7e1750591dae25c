"""Pictures by matplotlib, an optional dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .report import Choice, TuningReport


def pyplot() -> Any:
    """Return matplotlib's pyplot, set to draw into files; raise MissingExtraError if it is not installed."""
    try:
        import matplotlib  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("drawing pictures", "plot", error) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plotting  # noqa: PLC0415

    return plotting


def draw_front(report: TuningReport, path: Path) -> None:
    """Draw the front, each member alone and the chosen point, as accuracy on the tuning texts over speed-up."""
    plotting = pyplot()
    figure, axis = plotting.subplots(figsize=(6, 4), layout="constrained")

    def draw(choices: list[Choice], style: str, label: str, size: int) -> None:
        speedups = [choice.speedup(report.question.cost) for choice in choices]
        axis.plot(speedups, [100 * choice.accuracy for choice in choices], style, label=label, markersize=size)

    draw(report.front, ".", "front", 4)  # of estimated drops: accuracy may go up and down along it
    draw(report.alone, "ks", "one member alone", 5)
    if report.chosen:
        draw([report.chosen], "r*", "chosen", 13)
    measure = "accuracy" if report.compared_with == "labels" else "agreement with the last member"
    axis.set(xlabel=f"speed-up over the last member alone ({report.question.cost})", ylabel=f"{measure}, %")
    axis.legend()
    figure.savefig(path, dpi=120)
    plotting.close(figure)
