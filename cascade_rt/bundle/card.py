"""The model card that the hub shows for a bundle, made from its manifest."""

from __future__ import annotations

import json
from typing import Any

from .manifest import MULTI_LABEL, TRADE_OFFS, TUNING, Bundle, MemberEntry

_SHOWN_LABELS = 12


def model_card(bundle: Bundle, name: str) -> str:
    """Return a bundle's model card: Markdown with the hub's metadata, members, use, metrics, data and tuning."""
    texts = "pairs of texts" if bundle.pair else "single texts"
    example = '("a text", "its pair")' if bundle.pair else '"a text"'
    checks = [_checked(member) for member in bundle.members]
    sections = [
        "---\nlibrary_name: cascade-rt\npipeline_tag: text-classification\ntags: [cascade, early-exit, onnx]\n---",
        f"# {name.rpartition('/')[2]}",
        f"{_kind(bundle)} It takes {texts} of up to {bundle.max_length} tokens; {len(bundle.labels)} labels"
        f"{', of which a text has any number' if bundle.task == MULTI_LABEL else ''}: {first_labels(bundle)}.",
        "## Members\n\n"
        + _table(
            ["member", "layers", "hidden size", "weights", "precision", "threshold"],
            [
                [
                    member.name,
                    str(member.layers),
                    str(member.hidden_size),
                    f"{member.parameters / 1e6:.1f}M",
                    member.precision,
                    ("always answers" if member is bundle.members[-1] else "-")
                    if member.threshold is None
                    else f"{member.threshold:.4f}",
                ]
                for member in bundle.members
            ],
        ),
        "## Use\n\n```bash\npip install cascade-rt\n"
        f"cascade-rt predict --model-dir hf:{name} --input texts.txt\n```\n\n"
        "```python\nfrom cascade_rt import CascadeRuntime\n\n"
        f'runtime = CascadeRuntime("hf:{name}")\nruntime.predict([{example}])\n```',
    ]
    if any(checks):
        sections.append(
            "## Metrics\n\nOf the exported files, on the data of their export:\n\n"
            + _table(["member", "texts", "accuracy", "ECE", "labels as the original"], [row for row in checks if row])
        )
    if trained := _trained(bundle):
        sections.append("## Data and training\n\n" + trained)
    tuning = bundle.other.get(TUNING)
    if isinstance(tuning, dict) and (rows := _trade_offs(tuning)):
        sections.append(
            "## Trade-offs\n\nOn the texts that chose the thresholds; speed-ups are over the last member alone, by the "
            "time of single texts where they were tuned.\n\n" + _table(["members", "accuracy", "speed-up"], rows)
        )
    if bundle.other:
        written = dict(bundle.other)
        if isinstance(tuning, dict):
            written[TUNING] = {key: value for key, value in tuning.items() if key != TRADE_OFFS}
        sections.append("## Tuning\n\n```json\n" + json.dumps(written, indent=1, ensure_ascii=False) + "\n```")
    return "\n\n".join(sections) + "\n"


def first_labels(bundle: Bundle) -> str:
    """Return a bundle's labels in one line, of many the first."""
    return ", ".join(bundle.labels[:_SHOWN_LABELS]) + (", ..." if len(bundle.labels) > _SHOWN_LABELS else "")


def _kind(bundle: Bundle) -> str:
    if bundle.is_cascade:
        return (
            f"A cascade of {len(bundle.members)} complete classifiers for cascade-rt: each text is answered by the "
            "first member whose confidence exceeds its threshold."
        )
    settings = ", ".join(f"{key}: {value}" for key, value in bundle.exit_rule.items())
    return f"A model with {len(bundle.members)} exits for cascade-rt (exit rule: {settings})."


def _checked(member: MemberEntry) -> list[str] | None:
    check = member.other.get("check")
    if not isinstance(check, dict):
        return None

    def percent(key: str) -> str:
        value = check.get(key)
        value = value.get("exported") if isinstance(value, dict) else value
        return f"{100 * value:.2f}%" if isinstance(value, int | float) and 0 <= value <= 1 else "-"

    return [member.name, str(check.get("texts", "-")), percent("accuracy"), percent("ece"), percent("labels_agree")]


def _trade_offs(tuning: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the front and of each member alone, by speed, the tuned choice in bold; none if not known."""
    known = tuning.get(TRADE_OFFS)
    points = [tuning, *known] if isinstance(known, list) else []
    try:
        rows = {(" + ".join(point["members"]), point["accuracy"], point["latency_speedup"]) for point in points}
        chosen = (" + ".join(tuning["members"]), tuning["accuracy"], tuning["latency_speedup"])
        return [
            [f"**{cell}**" if row == chosen else cell for cell in (row[0], f"{100 * row[1]:.2f}%", f"{row[2]:.2f}x")]
            for row in sorted(rows, key=lambda row: -row[2])
        ]
    except (KeyError, TypeError, ValueError):  # other writers may leave keys out
        return []


def _trained(bundle: Bundle) -> str:
    checkpoints: Any = bundle.provenance.get("checkpoints", {})
    lines = []
    for name, origin in checkpoints.items() if isinstance(checkpoints, dict) else []:
        training = origin.get("training", {}) if isinstance(origin, dict) else {}
        facts = {key: training[key] for key in ("base", "task", "data", "recipe", "validation") if key in training}
        if facts:
            lines.append(f"- **{name}**: `{json.dumps(facts, ensure_ascii=False)}`")
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
