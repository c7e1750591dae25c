"""`cascade-rt train`: fine-tune one member of a cascade. `cascade-rt difficulty`: label instances for its DAR."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rt.cli import CommandParser
from cascade_rt.errors import InputError, MissingExtraError
from cascade_rt.evaluation import label_ids
from cascade_rt.records import read_examples, write_json
from cascade_rt.tuning import open_whole
from cascade_train.tasks import TASKS, TaskData, load_file, load_task

# Margins of the paper (section 4.1), found on each task's validation data.
_MARGINS = {"mnli": 0.3, "mrpc": 0.5, "qnli": 0.3, "qqp": 0.3, "rte": 0.5, "sst-2": 0.5}
_OTHER_MARGIN = 0.5
_GRID = (0.1, 0.3, 0.5, 0.7)


def main(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt train`), fine-tune, and say where the member is."""
    options = _parser().parse_args(argv)
    _need_extra("train")
    from cascade_train.finetune import Objective, finetune, search_margin, teacher_logits  # noqa: PLC0415 - loads torch

    data, recipe = _load(options), _recipe(options)
    if options.dar_grid and not options.difficulty:
        raise InputError("found --dar-grid alone, expected --difficulty FOLDER with it")
    with redirect_stdout(sys.stderr):  # the Trainer's log is progress, not the answer
        objective = Objective(
            difficulty=_difficulty(options, data),
            dar_margin=_MARGINS.get(data.name, _OTHER_MARGIN) if options.dar_margin is None else options.dar_margin,
            dar_weight=options.dar_weight,
            teacher=teacher_logits(options.teacher, data, recipe) if options.teacher else None,
            temperature=options.temperature,
            distill_weight=options.distill_weight,
        )
        settings: dict[str, Any] = {"layers": options.layers, "recipe": recipe, "objective": objective}
        if options.dar_grid:
            record = search_margin(options.base, data, options.output, _GRID, **settings)
        else:
            record = finetune(options.base, data, options.output, **settings)
    if options.json:
        print(json.dumps(record))
    else:
        print(
            f"{options.output}: {data.name}, {len(data.train)} training, {len(data.validation)} validation examples, "
            f"best validation {data.metric} {record['validation']['best']:.4f}"
            + "".join(f", {name} {told}" for name, told in record["objective"].items())
        )


def label(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt difficulty`), label, and say how many are difficult."""
    options = _difficulty_parser().parse_args(argv)
    _need_extra("difficulty")
    from cascade_train.difficulty import label_difficulty  # noqa: PLC0415 - loads torch

    data = _load(options)
    with redirect_stdout(sys.stderr):
        summary = label_difficulty(
            options.base,
            data,
            options.output,
            layers=options.layers,
            recipe=_recipe(options),
            folds=options.folds,
            seeds=options.seeds,
            jobs=options.jobs,
        )
    if options.json:
        print(json.dumps(summary))
        return
    shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in summary["difficult_by_class"].items())
    print(f"{options.output}: {len(data.train)} instances, {100 * summary['difficult']:.1f}% difficult ({shares})")


def analyse(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt analyse`), and write pictures and their numbers."""
    options = _analysis_parser().parse_args(argv)
    _need_extra("analyse")
    try:
        import matplotlib  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("cascade-rt analyse", "analysis", error) from None
    from cascade_train.analysis import draw_projection, project, representations, write_analysis  # noqa: PLC0415

    runtime = open_whole(options.model_dir, thresholds=options.threshold)
    bundle = runtime.bundle
    examples = list(read_examples(options.input, pair=bundle.pair))
    if not examples:
        raise InputError(f"{options.input}: found no examples, expected at least one")
    labels = label_ids([(row.field(options.label_column), row.where) for row in examples], bundle.labels)
    texts = [row.text for row in examples]
    found = write_analysis(bundle.members, runtime.thresholds, runtime.member_logits(texts)[0], labels, options.output)
    if options.member:
        rows = np.random.default_rng(0).permutation(len(texts))[: options.points]
        points = {
            Path(member).name: project(representations(member, [texts[row] for row in rows], bundle.max_length))
            for member in options.member
        }
        draw_projection(points, labels[rows], bundle.labels, options.output / "representations.png")
        told = {name: places.tolist() for name, places in points.items()}
        write_json(options.output / "representations.json", {"labels": labels[rows].tolist(), "points": told})
    for row in found["expected_gain"]:
        print(
            f"{row['added']}: expected gain {100 * row['expected_gain']:.2f} points; accuracy {100 * row['with']:.2f} "
            f"with it at {row['layer_speedup_with']:.2f}x, {100 * row['without']:.2f} without it at "
            f"{row['layer_speedup_without']:.2f}x"
        )
    print(f"{options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")


def _need_extra(command: str) -> None:
    try:
        import sklearn  # noqa: F401, PLC0415 - splits the data
        import torch  # noqa: F401, PLC0415 - transformers imports without it
        import transformers  # noqa: PLC0415 - slow to import

        import cascade_train.finetune  # noqa: F401, PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError(f"cascade-rt {command}", "export", error) from None
    transformers.logging.set_verbosity_error()  # its notes on new classifier weights are no news here


def _difficulty(options: argparse.Namespace, data: TaskData) -> list[int] | None:
    from cascade_train.difficulty import read_difficulty  # noqa: PLC0415 - loads torch

    return read_difficulty(options.difficulty, data.train) if options.difficulty else None


def _recipe(options: argparse.Namespace) -> Any:
    from cascade_train.finetune import Recipe  # noqa: PLC0415 - loads torch

    return Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_length=options.max_length,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        seed=options.seed,
        evaluations_per_epoch=options.evaluations_per_epoch,
        bf16=options.bf16,
    )


def _load(options: argparse.Namespace) -> TaskData:
    if (options.task is None) == (options.train_file is None):
        raise InputError("name what to learn: either --task or --train-file")
    if options.task:
        return load_task(options.task, options.data, holdout=options.holdout, seed=options.split_seed)
    columns: tuple[str, ...] | None = (options.text_column,) if options.text_column else None
    if options.pair_column:
        if not columns:
            raise InputError("found --pair-column alone, expected --text-column with it")
        columns = (*columns, options.pair_column)
    return load_file(
        options.train_file,
        validation=options.validation_file,
        columns=columns,
        pair=options.pair_column is not None,
        label_column=options.label_column,
        metric=options.metric,
        holdout=options.holdout,
        seed=options.split_seed,
    )


def _parser() -> CommandParser:
    parser = _common_parser(
        "train",
        "Fine-tune one member. The defaults are the recipe of the CascadeBERT paper. A killed run resumes where it was "
        "when the same command is given again.",
        "the member's folder, a normal Hugging Face one",
    )
    sure = parser.add_argument_group("how sure it may be: difficulty-aware regularization (DAR)")
    sure.add_argument("--difficulty", type=Path, metavar="FOLDER", help="labels that cascade-rt difficulty wrote")
    sure.add_argument("--dar-margin", type=float, help="eps; default: the paper's for the task, else 0.5")
    sure.add_argument("--dar-weight", type=float, default=0.5, help="lambda")
    sure.add_argument(
        "--dar-grid",
        action="store_true",
        help=f"try the margins {', '.join(map(str, _GRID))}; keep the best on validation",
    )
    taught = parser.add_argument_group("from a bigger member: knowledge distillation")
    taught.add_argument("--teacher", metavar="DIR", help="a fine-tuned member with the same labels")
    taught.add_argument("--temperature", type=float, default=2.0, help="that softens both answers")
    taught.add_argument("--distill-weight", type=float, default=0.5, help="of the soft loss; the labels have the rest")
    return parser


def _difficulty_parser() -> CommandParser:
    parser = _common_parser(
        "difficulty",
        "Label the training instances of a task as easy or difficult for a member: the member is trained on all folds "
        "but one and predicts that one, for several seeds; easy is what all got right. A killed run resumes.",
        "the folder of the labels, for cascade-rt train --difficulty",
    )
    parser.add_argument("--folds", type=int, default=8, help="parts of the training set")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions")
    parser.add_argument("--jobs", type=int, default=1, help="folds trained side by side, sharing the CPUs")
    return parser


def _analysis_parser() -> CommandParser:
    parser = CommandParser(
        prog="cascade-rt analyse",
        description="Draw a bundle's reliability diagrams, its accuracy over speed-up, the expected gain of its middle "
        "members, and its members' representations by t-SNE; the numbers lie beside the pictures as JSON.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder")
    add("--input", required=True, metavar="FILE", help="a labelled file")
    add("--label-column", default="label", help="default: label")
    add("--threshold", type=float, metavar="TAU", help="one tau for all members; default: the bundle's")
    add("--member", action="append", default=[], metavar="DIR", help="Hugging Face folder to project; one per member")
    add("--points", type=int, default=500, help="texts to project; default: 500")
    add("--output", required=True, type=Path, metavar="FOLDER", help="for the pictures")
    return parser


def _common_parser(command: str, description: str, output: str) -> CommandParser:
    parser = CommandParser(
        prog=f"cascade-rt {command}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="encoder to start from: a Hugging Face folder or hub id")
    add("--output", required=True, type=Path, help=output)
    add("--layers", type=int, help="keep only the first k encoder layers (BERT-kL); default: all")
    data = parser.add_argument_group("what to learn")
    data.add_argument("--task", choices=TASKS, help="a task by name")
    data.add_argument("--data", type=Path, help="folder with the task's official files (not for smart-home)")
    data.add_argument("--train-file", type=Path, help="instead of --task: a csv, tsv, jsonl or parquet file")
    data.add_argument("--validation-file", type=Path, help="with --train-file; default: a part is held out")
    data.add_argument("--text-column", help="default: the usual names")
    data.add_argument("--pair-column", help="the second text, for tasks on pairs")
    data.add_argument("--label-column", default="label", help="its values become the label names")
    data.add_argument("--metric", choices=("accuracy", "f1"), default="accuracy", help="with --train-file")
    data.add_argument("--holdout", type=float, default=0.1, help="share of training held out for validation")
    data.add_argument("--split-seed", type=int, default=0, help="the held-out part; keep it equal for all members")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=10, help="passes over the training data")
    recipe.add_argument("--learning-rate", type=float, default=2e-5, help="peak rate of AdamW, then linear decay")
    recipe.add_argument("--batch-size", type=int, default=32, help="texts per step, grouped by length")
    recipe.add_argument("--max-length", type=int, default=128, help="tokens; longer texts are cut")
    recipe.add_argument("--warmup-ratio", type=float, default=0.0, help="share of the steps")
    recipe.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    recipe.add_argument("--seed", type=int, default=0, help="of the new classifier, dropout and batch order")
    recipe.add_argument(
        "--evaluations-per-epoch", type=int, default=1, help="validations, each with a checkpoint to resume from"
    )
    recipe.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16 where that is safe: faster on CPUs with AMX, and on GPUs",
    )
    add("--json", action="store_true", help="print the whole training record as JSON")
    return parser
