"""Options that `train` and `difficulty` share: the encoder, the data and the recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cascade_rt.cli.options import add_label_column, add_reading, of_options, reading
from cascade_rt.cli.parser import CommandParser, Paths
from cascade_rt.cli.rendering import printable
from cascade_rt.errors import InputError, MissingExtraError
from cascade_rt.io.fields import is_blank
from cascade_rt.io.readers import read_examples
from cascade_rt.types import Text
from cascade_train.tasks import TASKS, TaskData, load_file, load_task


def with_work(output: Path | str) -> list[Path | str]:
    """Return what is written by a command that trains: the output, and the folder of its work."""
    return [output, f"{output}.training"]


def add_training(parser: CommandParser, *, output: str, writes: Paths) -> None:
    """Add the encoder, the data and the recipe; `output` describes what is written, `writes` is all of it."""
    add = parser.add_argument
    add(
        "--base",
        required=True,
        metavar="DIR",
        help="encoder to start from: a Hugging Face folder or hf:NAME",
    )
    add("--output", required=True, type=Path, metavar="DIR", help=output)
    add("--layers", type=int, metavar="K", help="keep only the first K encoder layers (BERT-kL) (default: all)")
    add(
        "--tokenizer",
        metavar="DIR",
        help="fine-tune under the tokenizer of this folder, to join a cascade of another origin: it must have the "
        "encoder's words, under any ids (default: the encoder's own)",
    )
    parser.reads("base", "tokenizer")
    parser.writes("output", paths=writes)
    add("--json", action="store_true", help="print the whole record as JSON")
    add_data(parser)
    add_recipe(parser)


def add_data(parser: CommandParser) -> None:
    """Add a task by name, or a labelled file."""
    data = parser.add_argument_group("data")
    data.add_argument("--task", choices=TASKS, help="a task by name")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of the task's official files (not smart-home)")
    data.add_argument("--train-file", type=Path, metavar="FILE", help="instead of --task: csv, tsv, jsonl or parquet")
    data.add_argument(
        "--validation-file", type=Path, metavar="FILE", help="with --train-file (default: a part is held out)"
    )
    parser.reads("data", "train_file", "validation_file")
    add_reading(parser, of="the files", group=data)
    add_label_column(parser, data)
    data.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a row of --train-file without text or label, or one that cannot be read: stop, or leave it out",
    )
    data.add_argument(
        "--metric", choices=("accuracy", "f1"), help="with --train-file (default: accuracy, or f1 with several labels)"
    )
    data.add_argument("--holdout", type=float, default=0.1, help="share of training held out for validation")
    data.add_argument("--split-seed", type=int, default=0, help="random seed of that split; use one for all members")


def add_recipe(parser: CommandParser) -> None:
    """Add how to fine-tune one member; the defaults are the paper's."""
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=10, help="passes over the training data")
    recipe.add_argument("--learning-rate", type=float, default=2e-5, help="peak rate of AdamW, then linear decay")
    recipe.add_argument("--batch-size", type=int, default=32, help="texts per step, grouped by length")
    recipe.add_argument("--max-length", type=int, default=128, help="tokens; longer texts are cut")
    recipe.add_argument("--warmup-ratio", type=float, default=0.0, help="share of the steps that warm up")
    recipe.add_argument("--weight-decay", type=float, default=0.0, help="weight decay of AdamW")
    recipe.add_argument(
        "--seed", type=int, default=0, help="random seed of the new classifier, dropout and batch order"
    )
    recipe.add_argument(
        "--evaluations-per-epoch", type=int, default=1, help="validations, each with a checkpoint to resume from"
    )
    recipe.add_argument("--bf16", action="store_true", help="train in bfloat16: faster on CPUs with AMX, and on GPUs")
    recipe.add_argument(
        "--freeze-embeddings",
        action="store_true",
        help="leave the table of the words as it is: members of one encoder then share it in a bundle",
    )


def need_training(command: str) -> None:
    """Load torch and transformers; raise MissingExtraError, which names `command`, if they are not installed."""
    try:
        import sklearn  # noqa: F401, PLC0415 - splits the data
        import torch  # noqa: F401, PLC0415 - transformers imports without it
        import transformers  # noqa: PLC0415 - slow to import

        import cascade_train.finetune  # noqa: F401, PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError(f"cascade-rt {command}", "export", error) from error
    transformers.logging.set_verbosity_error()  # no notes on new classifier weights


def recipe_from(options: argparse.Namespace) -> Any:
    """Return the recipe of the options."""
    from cascade_train.finetune import Recipe  # noqa: PLC0415 - loads torch

    return of_options(Recipe, options)


def data_from(options: argparse.Namespace) -> TaskData:
    """Load the data of the options."""
    if options.task is None and options.train_file is None:
        raise InputError("found neither --task nor --train-file, expected one of them")
    if options.task is not None and options.train_file is not None:
        raise InputError("found --task and --train-file, expected one of them")
    if options.task:
        return load_task(options.task, options.data, holdout=options.holdout, split_seed=options.split_seed)
    skipped: list[str] = []
    data = load_file(
        options.train_file,
        validation=options.validation_file,
        reading=reading(options),
        pair=options.pair_column is not None,
        metric=options.metric,
        holdout=options.holdout,
        split_seed=options.split_seed,
        skipped=skipped if options.on_error == "skip" else None,
    )
    if skipped:
        print(printable(f"{len(skipped):,} rows were left out, the first: {skipped[0]}"), file=sys.stderr)
    return data


def announce(data: TaskData) -> None:
    """Print the sizes of the training data on standard error."""
    print(
        f"{data.name}: {len(data.train)} texts to train on, {len(data.validation)} to validate on, "
        f"{len(data.labels)} labels",
        file=sys.stderr,
        flush=True,
    )


def unlabelled_from(options: argparse.Namespace, pair: bool) -> list[Text]:
    """Read the texts without labels of the options; blank ones are left out."""
    how = reading(options)
    rows = (row for file in options.unlabelled for row in read_examples(file, how.of_texts(file), pair=pair))
    return [row.text for row in rows if not is_blank(row.text)]
