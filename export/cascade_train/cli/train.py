"""Fine-tune one member. The defaults are the recipe of the CascadeBERT paper (section 4.1).

A killed run resumes when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from cascade_rt.cli.options import of_options
from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import InputError
from cascade_train.cli.options import add_training, announce, data_from, need_training, recipe_from, with_work
from cascade_train.cli.trial import add_export_check, check_export

SUMMARY = "fine-tune one member (extra: export)"
EXAMPLE = "cascade-rt train --train-file labelled.csv --base hf:bert-base-uncased --output members/12L"

# Margins of the paper (section 4.1), found on each task's validation data.
_MARGINS = {"mnli": 0.3, "mrpc": 0.5, "qnli": 0.3, "qqp": 0.3, "rte": 0.5, "sst-2": 0.5}
_OTHER_MARGIN = 0.5
_GRID = (0.1, 0.3, 0.5, 0.7)


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_training(parser, output="the member's folder, in Hugging Face format", writes=_written)
    dar = parser.add_argument_group("difficulty-aware regularization (DAR)")
    dar.add_argument("--difficulty", type=Path, metavar="DIR", help="labels that cascade-rt difficulty wrote")
    parser.reads("difficulty")
    dar.add_argument("--dar-margin", type=float, help="eps (default: the paper's for the task, else 0.5)")
    dar.add_argument("--dar-weight", type=float, default=0.5, help="lambda")
    margins = ", ".join(map(str, _GRID))
    dar.add_argument("--dar-grid", action="store_true", help=f"try the margins {margins}; keep the best on validation")
    distillation = parser.add_argument_group("knowledge distillation")
    distillation.add_argument("--teacher", metavar="DIR", help="a fine-tuned member with the same labels")
    parser.reads("teacher")
    distillation.add_argument("--temperature", type=float, default=2.0, help="temperature of the distillation")
    distillation.add_argument("--distill-weight", type=float, default=0.5, help="weight of the soft loss, out of 1")
    distillation.add_argument(
        "--patient",
        choices=("skip", "last"),
        help="learn the teacher's hidden states too (BERT-PKD): those of layers across its depth, or of the last ones",
    )
    distillation.add_argument("--patient-weight", type=float, default=0.5, help="weight of that loss")
    parser.add_argument(
        "--module-replacing",
        action="store_true",
        help="BERT-of-Theseus: --base is a fine-tuned member, and K layers (--layers) replace its modules bit by bit",
    )
    add_export_check(parser)


def _written(output: Path) -> list[Path | str]:
    """Return what is written: the member, or one for each margin until the best is chosen; and the work."""
    folders: list[Path | str] = [output, *(f"{output}.margin-{margin:g}" for margin in _GRID)]
    return [path for folder in folders for path in with_work(folder)]


def run(options: argparse.Namespace) -> None:
    """Fine-tune, and print where the member is."""
    need_training("train")
    from cascade_train.difficulty import read_difficulty  # noqa: PLC0415 - loads torch
    from cascade_train.finetune import Objective, check_member, finetune, search_margin, teacher_logits  # noqa: PLC0415

    data, recipe = data_from(options), recipe_from(options)
    if options.dar_grid and not options.difficulty:
        raise InputError("--dar-grid requires --difficulty FOLDER")
    if options.patient and not options.teacher:
        raise InputError("--patient requires --teacher DIR")
    if options.module_replacing and not options.layers:
        raise InputError("--module-replacing requires --layers K")
    with redirect_stdout(sys.stderr):
        check_export(options, data.labels, layers=options.layers, tokenizer=options.tokenizer, pair=data.pair)
    if options.teacher:
        check_member(options.teacher, data.labels, "teacher", several=data.several)
    announce(data)
    objective = of_options(
        Objective,
        options,
        difficulty=read_difficulty(options.difficulty, data.train) if options.difficulty else None,
        dar_margin=_MARGINS.get(data.name, _OTHER_MARGIN) if options.dar_margin is None else options.dar_margin,
        teacher=teacher_logits(options.teacher, data, recipe) if options.teacher else None,
        patient=_teacher_states(options, data, recipe) if options.patient else None,
    )
    settings: dict[str, Any] = {
        "layers": options.layers,
        "tokenizer": options.tokenizer,
        "module_replacing": options.module_replacing,
        "recipe": recipe,
        "objective": objective,
    }
    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        if options.dar_grid:
            record = search_margin(options.base, data, options.output, _GRID, **settings)
        else:
            record = finetune(options.base, data, options.output, **settings)
    if options.json:
        print(json.dumps(record))
    else:
        print(
            f"{options.output}: {data.name}, {len(data.train)} training and {len(data.validation)} validation "
            f"examples, best validation {data.metric} {record['validation']['best']:.4f}" + _objective(record)
        )


def _teacher_states(options: argparse.Namespace, data: Any, recipe: Any) -> Any:
    from cascade_train.finetune import load_base, teacher_states  # noqa: PLC0415 - loads torch

    layers = options.layers or load_base(options.base, data.labels, None)[1].config.num_hidden_layers
    return teacher_states(options.teacher, data, recipe, layers, options.patient)


def _objective(record: dict[str, Any]) -> str:
    parts = [
        f", {name} (" + ", ".join(f"{key} {value}" for key, value in settings.items()) + ")"
        for name, settings in record["objective"].items()
    ]
    return "".join(parts)
