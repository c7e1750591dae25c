"""Train a deep averaging network (DAN): a member without layers, which costs little more than tokenization.

It averages vectors of word pieces and of their n-grams. A killed run resumes when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cascade_rt.cli.options import of_options
from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import InputError
from cascade_train.cli.options import add_data, announce, data_from, need_training, unlabelled_from, with_work

SUMMARY = "train a deep averaging network, a member without layers (extra: export)"
EXAMPLE = "cascade-rt train-dan --train-file labelled.csv --teacher members/12L --output members/DAN"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--tokenizer", metavar="DIR", help="the cascade's tokenizer: a folder or hf:NAME (default: the teacher's)")
    add(
        "--unigrams",
        metavar="DIR",
        help="start the vectors of tokens from this encoder's answers to single tokens (default: the teacher; without "
        "both, at random)",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="the member's folder, in Hugging Face format")
    parser.reads("tokenizer", "unigrams")
    parser.writes("output", paths=with_work)
    add("--json", action="store_true", help="print the whole record as JSON")
    add_data(parser)
    network = parser.add_argument_group("network")
    network.add_argument("--ngrams", type=int, default=2, help="the longest n-grams, in tokens: 1 to 3")
    network.add_argument("--buckets", type=int, default=131_072, help="rows of the table that n-grams are hashed to")
    network.add_argument("--dimension", type=int, default=128, help="columns of the table")
    network.add_argument("--hidden", type=int, default=256, help="width of the hidden layer")
    network.add_argument("--dropout", type=float, default=0.3, help="of the hidden layer")
    network.add_argument(
        "--token-dropout", type=float, default=0.2, help="share of the tokens and n-grams that a step leaves out"
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=float, default=20, help="passes over the training data, at most")
    recipe.add_argument("--patience", type=int, default=5, help="epochs without an improvement that end the training")
    recipe.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate of Adam, then linear decay")
    recipe.add_argument("--batch-size", type=int, default=64, help="texts per step")
    recipe.add_argument("--max-length", type=int, default=128, help="tokens; longer texts are cut")
    recipe.add_argument("--seed", type=int, default=0, help="random seed of weights, dropout and batch order")
    distillation = parser.add_argument_group("knowledge distillation")
    distillation.add_argument("--teacher", metavar="DIR", help="a fine-tuned member with the same labels")
    distillation.add_argument(
        "--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="texts without labels; repeatable"
    )
    distillation.add_argument(
        "--augment", type=int, default=0, metavar="N", help="make N variants of each training text as such texts"
    )
    parser.reads("teacher", "unlabelled")
    distillation.add_argument("--temperature", type=float, default=1.0, help="temperature of the distillation")
    distillation.add_argument("--distill-weight", type=float, default=0.5, help="weight of the soft loss, out of 1")


def run(options: argparse.Namespace) -> None:
    """Train, and print where the member is."""
    need_training("train-dan")
    from cascade_train.averaging import Network  # noqa: PLC0415 - loads torch
    from cascade_train.averaging_training import AveragingRecipe, train_averaging, untrained  # noqa: PLC0415
    from cascade_train.finetune import Objective, check_member, teacher_logits  # noqa: PLC0415
    from cascade_train.unlabelled import variants, with_answers, with_unlabelled  # noqa: PLC0415
    from cascade_train.work import work_folder  # noqa: PLC0415

    data, network, recipe = data_from(options), of_options(Network, options), of_options(AveragingRecipe, options)
    tokenizer = options.tokenizer or options.teacher or options.unigrams
    if tokenizer is None:
        raise InputError("found neither --tokenizer nor --teacher, expected --tokenizer DIR, that of the cascade")
    if not options.teacher and (options.unlabelled or options.augment):
        raise InputError("found texts without labels and no --teacher, expected --teacher DIR, whose answers they get")
    unigrams = options.unigrams or options.teacher
    work_folder(options.output, "train")
    untrained(data, tokenizer, unigrams, network, recipe)  # fails before the teacher's answers, not after
    unlabelled = unlabelled_from(options, data.pair)
    if options.teacher:
        check_member(options.teacher, data.labels, "teacher", several=data.several)
    announce(data)
    labelled, teacher = len(data.train), None
    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        if options.teacher:
            known = {*data.train.texts, *data.validation.texts}
            more = dict.fromkeys([*unlabelled, *variants(data.train.texts, options.augment, recipe.seed)])
            data = with_unlabelled(data, [text for text in more if text not in known])
            teacher = teacher_logits(options.teacher, data, recipe)
            data = with_answers(data, teacher, labelled)
        record = train_averaging(
            data,
            options.output,
            tokenizer=tokenizer,
            unigrams=unigrams,
            network=network,
            recipe=recipe,
            objective=of_options(Objective, options, teacher=teacher),
        )
    if options.json:
        print(json.dumps(record))
        return
    fresh = len(data.train) - labelled
    print(
        f"{options.output}: {data.name}, {labelled} training"
        + (f", {fresh} unlabelled" if fresh else "")
        + f" and {len(data.validation)} validation examples, best validation {data.metric} "
        f"{record['validation']['best']:.4f}"
    )
