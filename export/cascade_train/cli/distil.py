"""Make a small encoder that matches a big one's hidden states on plain text (general distillation).

For encoders without a small sibling. A killed run resumes when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cascade_rt.cli.options import add_reading, of_options, reading
from cascade_rt.cli.parser import CommandParser
from cascade_train.cli.options import need_training, with_work
from cascade_train.cli.trial import add_export_check, check_export

SUMMARY = "make a small encoder out of a big one, from plain text (extra: export)"
EXAMPLE = "cascade-rt distil --base hf:bert-base-uncased --layers 2 --texts sentences.txt --output encoders/2L"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--base", required=True, metavar="BIG", help="encoder to learn from: a Hugging Face folder or hf:NAME")
    parser.reads("base")
    add("--layers", required=True, type=int, metavar="K", help="layers of the small encoder")
    add(
        "--texts",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="plain text, the more the better: txt (one text a line), csv, tsv, jsonl or parquet",
    )
    parser.reads("texts")
    add_reading(parser, of="--texts", pair=False)
    add("--output", required=True, type=Path, metavar="DIR", help="the encoder's folder, in Hugging Face format")
    parser.writes("output", paths=with_work)
    add("--json", action="store_true", help="print the whole record as JSON")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=1, help="passes over the texts")
    recipe.add_argument("--steps", type=int, metavar="N", help="train for N batches instead")
    recipe.add_argument("--relations", action="store_true", help="learn self-attention relations too (MiniLMv2)")
    recipe.add_argument(
        "--train-embeddings", action="store_true", help="train the embeddings too; else they stay those of BIG"
    )
    recipe.add_argument("--learning-rate", type=float, default=6e-4, help="peak rate of AdamW, then linear decay")
    recipe.add_argument("--batch-size", type=int, default=64, help="texts per step, of like length")
    recipe.add_argument("--max-length", type=int, default=128, help="tokens; longer texts are cut")
    recipe.add_argument("--warmup-ratio", type=float, default=0.06, help="share of the steps that warm up")
    recipe.add_argument("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    recipe.add_argument("--seed", type=int, default=0, help="random seed of the batch order and the held-out texts")
    recipe.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (default: if measured to be faster)"
    )
    add_export_check(parser)


def run(options: argparse.Namespace) -> None:
    """Distil, and print where the encoder is and what comes next."""
    need_training("distil")
    from cascade_train.distil import Distillation, distil  # noqa: PLC0415 - loads torch

    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        check_export(options, layers=options.layers)
        record = distil(
            options.base,
            options.texts,
            options.output,
            layers=options.layers,
            reading=reading(options),
            recipe=of_options(Distillation, options),
        )
    if options.json:
        print(json.dumps(record))
        return
    validation = record["validation"]
    before = validation["history"][0]
    picked = ", ".join(str(layer + 1) for layer in record["picked"])
    print(
        f"{options.output}: {record['layers']} layers, from layers {picked} of {options.base}; "
        f"{record['texts']['training']} texts, {record['steps']} steps\n"
        f"on {record['texts']['validation']} held-out texts: error of the hidden states {validation['mse']:.4f} of "
        f"their variance ({before['eval_mse']:.4f} before training), cosine of the mean vectors "
        f"{validation['cosine']:.4f} ({before['eval_cosine']:.4f})\n"
        f"next: cascade-rt train --base {options.output} --train-file labelled.csv --output "
        f"members/{options.output.name}"
    )
