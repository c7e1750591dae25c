"""`cascade-rt train`: fine-tune one member of a cascade."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cascade_rt.cli import CommandParser
from cascade_rt.errors import InputError, MissingExtraError
from cascade_train.tasks import TASKS, TaskData, load_file, load_task


def main(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt train`), fine-tune, and say where the member is."""
    options = _parser().parse_args(argv)
    try:
        import sklearn  # noqa: F401, PLC0415 - splits the data
        import torch  # noqa: F401, PLC0415 - transformers imports without it
        import transformers  # noqa: PLC0415 - slow to import

        from cascade_train.finetune import Recipe, finetune  # noqa: PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError("cascade-rt train", "export", error) from None
    transformers.logging.set_verbosity_error()  # its notes on new classifier weights are no news here
    data = _load(options)
    recipe = Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_length=options.max_length,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        seed=options.seed,
        evaluations_per_epoch=options.evaluations_per_epoch,
    )
    with redirect_stdout(sys.stderr):  # the Trainer's log is progress, not the answer
        record = finetune(options.base, data, options.output, layers=options.layers, recipe=recipe)
    if options.json:
        print(json.dumps(record))
    else:
        print(
            f"{options.output}: {data.name}, {len(data.train)} training, {len(data.validation)} validation examples, "
            f"best validation {data.metric} {record['validation']['best']:.4f}"
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
    parser = CommandParser(
        prog="cascade-rt train",
        description="Fine-tune one member. The defaults are the recipe of the CascadeBERT paper. A killed run "
        "resumes where it was when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="encoder to start from: a Hugging Face folder or hub id")
    add("--output", required=True, type=Path, help="the member's folder, a normal Hugging Face one")
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
    add("--json", action="store_true", help="print the whole training record as JSON")
    return parser
