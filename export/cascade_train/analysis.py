"""The paper's pictures of a cascade (Figures 4 and 5, Appendices B and C), each with its numbers as JSON beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.cost import cumulative_layers, layer_speedup
from cascade_rt.engine.exit_rules import MaximumProbability, replay
from cascade_rt.engine.task import SingleLabel
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.metrics import equal_width_bins
from cascade_rt.tuning.plot import pyplot
from cascade_rt.types import Text
from cascade_train.finetune import last_linear
from cascade_train.sources import load_tokenizer, pretrained

_TASK = SingleLabel()

_CURVE_POINTS = 60


def reliability(confidences: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 15) -> list[dict[str, Any]]:
    """Return the bins of a reliability diagram (paper, Appendix B): equal widths, those without a text left out.

    `confidences`: float (texts,); `correct`: whether each answer is right, (texts,).
    """
    edges = np.linspace(0, 1, bins + 1)
    place = equal_width_bins(confidences, bins)
    return [
        {
            "from": float(edges[index]),
            "to": float(edges[index + 1]),
            "texts": int(np.sum(inside)),
            "confidence": float(confidences[inside].mean()),
            "accuracy": float(correct[inside].mean()),
        }
        for index in range(bins)
        if (inside := place == index).any()
    ]


def speedup_curve(
    members: Sequence[MemberEntry], probabilities: NDArray[np.float64], labels: NDArray[np.intp]
) -> list[dict[str, float]]:
    """Return accuracy over layer speed-up as one tau for all members decreases (paper, Figure 5).

    `probabilities`: (members, texts, labels) of all members on all texts; `labels`: class ids, (texts,).
    """
    sure, right = _TASK.confidence(probabilities), probabilities.argmax(axis=-1) == labels
    taus = np.unique(np.quantile(np.append(sure[:-1].ravel(), [0.0, 1.0]), np.linspace(0, 1, _CURVE_POINTS)))
    rows = np.arange(len(labels))
    curve = []
    for tau in taus[::-1]:
        left_at = replay(_shared(tau, members), sure)
        curve.append(
            {
                "tau": float(tau),
                "layer_speedup": layer_speedup(members, left_at) or math.inf,
                "accuracy": float(right[left_at, rows].mean()),
            }
        )
    return curve


def expected_gain(
    members: Sequence[MemberEntry],
    probabilities: NDArray[np.float64],
    labels: NDArray[np.intp],
    thresholds: Sequence[float],
) -> list[dict[str, Any]]:
    """Return, for each member between two others, the expected gain T(s*, L*) of having added it (paper, Eq. 13).

    T = (s* (a* - a_i) - L* / L_{i+1} (s_{i+1} + s*) (a_{i+1} - a_i)) / N, where a are the members' accuracies, s*
    and s_{i+1} the texts that exit at the added member and the next, L* and L_{i+1} their layers, N all texts: the
    change of accuracy against a cascade without it that executes as many layers. It takes each member's accuracy as
    its accuracy on whatever it answers; `without` and `with` are what the two cascades answer rightly on these very
    texts, the one without it at the tau (one for all its members) that executes the closest number of layers.
    """
    sure, right = _TASK.confidence(probabilities), probabilities.argmax(axis=-1) == labels
    accuracies = right.mean(axis=1)
    left_at = replay(MaximumProbability(tuple(thresholds)), sure)
    rows = np.arange(len(labels))
    layers = cumulative_layers(members)[left_at].sum()
    counts = np.bincount(left_at, minlength=len(members))
    found = []
    for index in range(1, len(members) - 1):
        before, added, after = (int(at) for at in (index - 1, index, index + 1))
        share = members[added].layers / members[after].layers
        gain = (
            counts[added] * (accuracies[added] - accuracies[before])
            - share * (counts[after] + counts[added]) * (accuracies[after] - accuracies[before])
        ) / len(labels)
        kept = [at for at in range(len(members)) if at != index]
        fewer = [members[at] for at in kept]
        other_exits = _nearest(fewer, sure[kept], float(layers))
        found.append(
            {
                "added": members[added].name,
                "expected_gain": float(gain),
                "exits": counts.tolist(),
                "member_accuracies": accuracies.tolist(),
                "with": float(right[left_at, rows].mean()),
                "without": float(right[kept][other_exits, rows].mean()),
                "layer_speedup_with": layer_speedup(members, left_at),
                "layer_speedup_without": layer_speedup(fewer, other_exits),
            }
        )
    return found


def _shared(tau: float, members: Sequence[MemberEntry]) -> MaximumProbability:
    return MaximumProbability((float(tau),) * (len(members) - 1))


def _nearest(members: Sequence[MemberEntry], sure: NDArray[np.float64], layers: float) -> NDArray[np.intp]:
    """Return the exits at the tau whose executed layers come nearest to `layers`."""
    taus = np.unique(np.append(sure[:-1].ravel(), [0.0, 1.0]))
    low, high = 0, len(taus) - 1  # layers grow with tau
    each = cumulative_layers(members)
    while low < high:
        middle = (low + high) // 2
        if each[replay(_shared(taus[middle], members), sure)].sum() >= layers:
            high = middle
        else:
            low = middle + 1
    tried = [replay(_shared(taus[at], members), sure) for at in {max(0, low - 1), low}]
    return min(tried, key=lambda left_at: abs(float(each[left_at].sum()) - layers))


def write_analysis(
    members: Sequence[MemberEntry],
    thresholds: Sequence[float],
    logits: NDArray[np.float32],
    labels: NDArray[np.intp],
    output: Path,
) -> dict[str, Any]:
    """Write reliability diagrams, the curve of accuracy over speed-up, and expected gains into `output`; return them.

    `logits`: float32 (members, texts, labels), from `CascadeRuntime.member_logits`; `labels`: class ids (texts,).
    """
    probabilities = _TASK.probabilities(logits)
    sure, right = _TASK.confidence(probabilities), probabilities.argmax(axis=-1) == labels
    diagrams = {member.name: reliability(sure[at], right[at]) for at, member in enumerate(members)}
    curves = {_named(members): speedup_curve(members, probabilities, labels)}
    if len(members) > 2:
        ends = [0, len(members) - 1]
        pair = [members[at] for at in ends]
        curves[_named(pair)] = speedup_curve(pair, probabilities[ends], labels)
    gains = expected_gain(members, probabilities, labels, thresholds)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "reliability.json", diagrams)
    write_json(output / "speedup.json", curves)
    write_json(output / "expected-gain.json", gains)
    draw_reliability(diagrams, output / "reliability.png")
    draw_curves(curves, output / "speedup.png")
    return {"reliability": diagrams, "speedup": curves, "expected_gain": gains}


def _named(members: Sequence[MemberEntry]) -> str:
    return " + ".join(member.name for member in members)


def draw_reliability(diagrams: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw one reliability diagram per member, side by side."""
    figure, axes = _figure(len(diagrams))
    for axis, (name, bins) in zip(axes, diagrams.items(), strict=True):
        middle = [(row["from"] + row["to"]) / 2 for row in bins]
        axis.bar(middle, [row["accuracy"] for row in bins], width=0.9 / 15, label="accuracy")
        axis.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], "k.", label="bins")
        axis.plot([0, 1], [0, 1], "k--", linewidth=0.8)
        axis.set(title=name, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120)


def draw_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw accuracy over layer speed-up, one line per cascade."""
    figure, (axis,) = _figure(1)
    for name, curve in curves.items():
        axis.plot([row["layer_speedup"] for row in curve], [100 * row["accuracy"] for row in curve], ".-", label=name)
    axis.set(xlabel="layer speed-up", ylabel="accuracy, %")
    axis.legend()
    figure.savefig(path, dpi=120)


def draw_projection(
    points: dict[str, NDArray[np.float64]], labels: NDArray[np.intp], names: Sequence[str], path: Path
) -> None:
    """Draw each member's texts as points of the plane, float (texts, 2), coloured by class (paper, Figure 4)."""
    figure, axes = _figure(len(points))
    for axis, (member, places) in zip(axes, points.items(), strict=True):
        for index, name in enumerate(names):
            axis.scatter(*places[labels == index].T, s=4, label=name)
        axis.set(title=member, xticks=[], yticks=[])
    if len(names) <= 10:
        axes[0].legend()
    figure.savefig(path, dpi=120)


def project(representations: NDArray[np.float32], seed: int = 0) -> NDArray[np.float64]:
    """Return a t-SNE projection of (texts, hidden) representations onto the plane, float (texts, 2)."""
    from sklearn.manifold import TSNE  # noqa: PLC0415 - slow to import

    perplexity = min(30.0, (len(representations) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(representations))


def representations(source: str, texts: Sequence[Text], max_length: int) -> NDArray[np.float32]:
    """Return the input of a member's last layer for each text, float32 (texts, hidden); `source`: its folder."""
    import torch  # noqa: PLC0415 - slow to import
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    tokenizer = load_tokenizer(source)
    model = pretrained(AutoModelForSequenceClassification, source).eval()
    seen: list[NDArray[np.float32]] = []
    head = last_linear(model)
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].float().cpu().numpy()))
    for text in texts:
        first, second = (text, None) if isinstance(text, str) else text
        batch = tokenizer(first, second, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            model(**batch)
    return np.concatenate(seen)


def _figure(count: int) -> tuple[Any, Any]:
    figure, axes = pyplot().subplots(1, count, figsize=(4.2 * count, 3.8), layout="constrained", squeeze=False)
    return figure, axes[0]
