"""Build the best bundle from labelled texts: split once, train, export, tune, report.

The biggest member is trained on the labels, the small ones also on its predictions, for texts without labels
(--unlabelled) too.
Thresholds are chosen on texts that no member saw, and the result is measured on a test set, used for no choice. A
killed build continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_export.check import MAX_ACCURACY_DROP
from cascade_train.cli.options import add_data, data_from, need_training, unlabelled_from
from cascade_train.tasks import SMART_HOME

from cascade_rt.cli.options import of_options
from cascade_rt.cli.parser import CommandParser
from cascade_rt.cli.rendering import percent, table, times
from cascade_rt.errors import InputError, MissingExtraError
from cascade_rt.tuning.report import COSTS, Question

if TYPE_CHECKING:  # they load torch
    from cascade_build.plan import Plan, Step
    from cascade_build.report import BuildReport

SUMMARY = "train, export and tune a bundle from labelled texts (extra: build)"
EXAMPLE = "cascade-rt build --train-file tickets.csv --big bases/12L --small bases/3L --max-drop 0.01 --output bundle/"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add(
        "--big",
        required=True,
        metavar="BASE",
        help="encoder of the biggest member: a Hugging Face folder or hf:NAME, or BASE=K",
    )
    add(
        "--small",
        action="append",
        default=[],
        metavar="BASE",
        help="encoder of a small member, BASE=K for its first K layers only; repeat for each",
    )
    add(
        "--no-dan",
        dest="dan",
        action="store_false",
        help="leave out the member without layers, a deep averaging network (see train-dan)",
    )
    add("--output", required=True, type=Path, metavar="BUNDLE", help="the bundle's folder; work goes to BUNDLE.build")
    add("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="texts without labels; repeatable")
    parser.reads("big", "small", paths=_bases)
    parser.reads("unlabelled")
    parser.writes("output", paths=lambda output: [output, f"{output}.build"])
    add(
        "--augment",
        type=int,
        default=0,
        metavar="N",
        help="make N variants of each training text as texts without labels: words dropped, parts exchanged",
    )
    add("--dry-run", action="store_true", help="show the plan, with estimated times, and do nothing")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    add("--json", action="store_true", help="print the report, or the plan, as JSON")
    add_data(parser)
    parser.aliases["tokenizer"] = "--small"  # whose tokenizer the bundle has
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the texts for thresholds, and again for the measurement at the end",
    )
    asked = parser.add_argument_group("objective")
    asked.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="the fastest that loses at most this share of accuracy against the biggest member (default: 0.01)",
    )
    asked.add_argument(
        "--speedup",
        type=float,
        metavar="X",
        help="instead: the most accurate that is at least X times as fast as the biggest member",
    )
    asked.add_argument("--confidence", type=float, metavar="P", help="guarantee that with this confidence, e.g. 0.95")
    asked.add_argument("--cost", choices=COSTS, default="latency", help="how speed is measured; latency is timed here")
    asked.add_argument("--precision", default="fp32", help="of the bundle: fp32, fp16, int8, or auto for each member")
    asked.add_argument(
        "--max-accuracy-drop",
        type=float,
        default=MAX_ACCURACY_DROP,
        metavar="POINTS",
        help="percentage points that the precision may cost a member",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, help="passes over the data (default: about 3,000 steps, 2 to 10)")
    recipe.add_argument("--small-epochs", type=float, help="of the small members (default: as the biggest)")
    recipe.add_argument(
        "--dan-epochs", type=float, help="of the member without layers, at most (default: by size, 3 to 20)"
    )
    recipe.add_argument("--learning-rate", type=float, help="of the biggest member (default: by depth and width)")
    recipe.add_argument("--small-learning-rate", type=float, help="of the small members (default: likewise)")
    recipe.add_argument("--batch-size", type=int, default=32, help="texts per step, grouped by length")
    recipe.add_argument("--max-length", type=int, default=128, help="tokens; longer texts are cut")
    recipe.add_argument("--warmup-ratio", type=float, default=0.06, help="share of the steps that warm up")
    recipe.add_argument("--seed", type=int, default=0, help="random seed of classifiers, dropout and batch order")
    recipe.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="train in bfloat16 (default: where it is faster, which is measured)",
    )
    recipe.add_argument("--temperature", type=float, default=3.0, help="temperature of the distillation")
    recipe.add_argument(
        "--distill-weight", type=float, default=0.9, help="weight of the biggest member's answers, out of 1"
    )


def run(options: argparse.Namespace) -> None:
    """Plan; then show the plan, or carry it out and print the result."""
    need_training("build")
    try:
        from cascade_build.build import REPORT, build, work_folder  # noqa: PLC0415 - loads torch
        from cascade_build.plan import Asked, Plan, plan_members, plan_network, split, steps  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("cascade-rt build", "build", error) from error
    from cascade_train.finetune import Recipe  # noqa: PLC0415
    from cascade_train.hardware import bf16_pays  # noqa: PLC0415

    if not (options.small or options.dan):
        raise InputError("--no-dan requires --small BASE: a cascade has at least two members")
    max_drop = 0.01 if options.max_drop is None and options.speedup is None else options.max_drop
    question = Question(max_drop=max_drop, speedup=options.speedup, confidence=options.confidence, cost=options.cost)
    data = data_from(options)
    unlabelled = unlabelled_from(options, data.pair)
    parts = split(
        data,
        unlabelled,
        share=options.reserve,
        seed=options.split_seed,
        augment=options.augment,
        built_in=options.task == SMART_HOME,
    )
    recipe = of_options(Recipe, options, bf16=bf16_pays() if options.bf16 is None else options.bf16)
    members = plan_members(
        options.big,
        options.small,
        len(parts.data.train),
        len(parts.unlabelled),
        recipe=recipe,
        of_big=Asked(options.epochs, options.learning_rate),
        of_small=Asked(options.small_epochs, options.small_learning_rate),
    )
    texts = len(parts.data.train) + len(parts.unlabelled)
    network = plan_network(texts, recipe, options.dan_epochs) if options.dan else None
    plan = of_options(Plan, options, parts=parts, members=members, network=network, question=question)
    if options.dry_run:
        found = steps(plan)
        if options.json:
            print(json.dumps({"data": plan.data_settings(), "steps": [vars(step) for step in found]}))
        else:
            print(_plan(plan, found))
        return
    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        report = build(
            plan,
            options.output,
            overwrite=options.overwrite,
            announce=lambda begun: print(_plan(begun, steps(begun)), file=sys.stderr, flush=True),
        )
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        print(_result(report))
        print(f"\n{options.output}: the bundle\n{work_folder(options.output) / REPORT}: the report")


def _bases(written: str) -> list[str]:
    """Return the folders that BASE or BASE=K may be."""
    return [written, written.rpartition("=")[0] or written]


def _plan(plan: Plan, found: Sequence[Step]) -> str:
    parts = plan.parts
    lines = [
        f"{parts.data.name}: {len(parts.data.labels)} labels; {len(parts.data.train)} texts to train on, "
        f"{len(parts.data.validation)} to choose checkpoints by, {len(parts.tuning)} to tune on, "
        f"{len(parts.certification)} to measure on, {len(parts.unlabelled)} without labels",
        table(
            ["step", "about", "what"],
            [[step.name, _duration(step.seconds), step.what] for step in found],
        ),
        f"together about {_duration(sum(step.seconds for step in found))} on this machine",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _result(report: BuildReport) -> str:
    chosen, confirmed = report.tuning.chosen, report.tuning.held_out
    exits = dict(zip(chosen.members, report.cascade.exits, strict=True)) if chosen else {}
    rows = [
        [
            member.quality.name,
            str(member.quality.layers),
            str(exits.get(member.quality.name, 0)),
            *map(percent, (member.quality.accuracy, member.quality.f1, member.quality.dis, member.quality.ece)),
            f"{member.ms:.2f}",
            f"{report.members[-1].ms / member.ms:.2f}x",
        ]
        for member in report.members
    ]
    cascade = report.cascade
    if chosen and confirmed:
        rows.append(
            [
                "cascade" if len(chosen.members) > 1 else "chosen",
                f"{cascade.mean_layers:.2f}",
                str(sum(cascade.exits)),
                *map(percent, (cascade.accuracy, cascade.f1, cascade.dis, cascade.ece)),
                f"{confirmed.latency_ms:.2f}",
                times(confirmed.latency_speedup),
            ]
        )
    lines = [
        table(["", "layers", "exits", "accuracy", "F1", "DIS", "ECE", "ms per text", "speed-up"], rows),
        f"{report.texts['certification']} test texts, used for no choice; figures in %; thresholds "
        + (", ".join(f"{tau:.4f}" for tau in cascade.thresholds) or "none")
        + f", layer speed-up {times(cascade.layer_speedup)}",
        f"verdict: {report.tuning.verdict}",
    ]
    return "\n".join(lines)
