"""The time of each family against a BERT of as many layers, the same width and the same FLOPs.

    python benchmarks/families.py

Random weights, converted as any classifier's are. Members take turns on texts of one length, alone. Gated blocks have
three matrices, so their inner size is two thirds of BERT's; DeBERTa's attention has more products than BERT's, so its
FLOPs are higher. Families that the installed transformers lacks are left out. Needs the extra export.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from cascade_export.convert import convert
from cascade_export.flops import graph_flops
from cascade_export.precision import write_precision
from cascade_export.torch_checkpoint import open_torch
from common import RESULTS, run_command
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import spread
from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.backends import usable
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage
from cascade_rt.io.writers import write_json

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = 1000
_BERT = "bert"
_PRECISIONS = ("fp32", "int8")
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def main() -> None:
    """Export, time, print and write."""
    options = _parser().parse_args()
    with TemporaryDirectory() as name:
        stages: dict[tuple[str, str], Stage] = {}
        rows: dict[str, dict[str, Any]] = {}
        for family, settings in _families(options.layers, options.hidden):
            checkpoint = open_torch(str(_member(Path(name) / family, settings)))
            file = Path(name) / f"{family}-fp32.onnx"
            convert(checkpoint, file)
            constant, *factors = graph_flops(file)
            rows[family] = {"gflops_of_128_tokens": (constant + factors[0] * 128 + factors[1] * 128**2) / 1e9}
            for precision in _PRECISIONS:
                made = Path(name) / f"{family}-{precision}.onnx"
                if made != file:
                    write_precision(file, made, precision)
                entry = MemberEntry(family, made.name, "", options.layers, options.hidden, 1, precision, None)
                stages[family, precision] = Stage(entry, made, len(checkpoint.labels), usable(Execution(threads=1)))
                rows[family][precision] = {"operators": _operators(made)}
        for precision in _PRECISIONS:
            for tokens in options.tokens:
                found = _times(
                    {family: stages[family, precision] for family in rows}, tokens, options.texts, options.rounds
                )
                for family, times in found.items():
                    rows[family][precision][f"{tokens}_tokens"] = times
    report = {
        "machine": describe(),
        "transformers": version("transformers"),
        "layers": options.layers,
        "hidden_size": options.hidden,
        "families": rows,
    }
    write_json(options.output, report)
    for family, row in rows.items():
        for precision in _PRECISIONS:
            timed = [row[precision][f"{tokens}_tokens"] for tokens in options.tokens]
            shown = "  ".join(f"{one['ms']:7.2f} ms {one['against_bert']['median']:5.2f}x" for one in timed)
            print(f"{family:12} {precision}  {row[precision]['operators']:4} operators  {shown}")


def _families(layers: int, hidden: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the families that transformers has, with the settings of their models."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64}
    plain, gated = {**shape, "intermediate_size": 4 * hidden}, {**shape, "intermediate_size": 8 * hidden // 3}
    yield _BERT, {**plain, "model_type": "bert"}
    yield "xlm-roberta", {**plain, "model_type": "xlm-roberta"}
    yield "modernbert", {**gated, "model_type": "modernbert"}
    for kind in ("eurobert", "gte"):
        if find_spec(f"transformers.models.{kind}"):
            yield kind, {**gated, "model_type": kind}
    yield "deberta-v3", {**plain, **_DEBERTA, "model_type": "deberta-v2"}


def _member(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write a random classifier with a tokenizer of whole words; return its folder."""
    torch.manual_seed(0)
    words = [*_SPECIAL, *(f"w{index}" for index in range(_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    kind = settings["model_type"]
    more = {name: value for name, value in settings.items() if name != "model_type"}
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), max_position_embeddings=514, initializer_range=0.05, **_IDS, **more
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _operators(file: Path) -> int:
    return sum(node.op_type != "Constant" for node in onnx.load(file).graph.node)


def _times(stages: Mapping[str, Stage], tokens: int, texts: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each family the median milliseconds of a text, and its ratios to BERT over rounds."""
    draw = np.random.default_rng(0)
    mask = np.ones((1, tokens), dtype=np.int64)
    calls = [
        {
            "input_ids": draw.integers(len(_SPECIAL), _WORDS, (1, tokens)),
            "attention_mask": mask,
            "token_type_ids": 0 * mask,
        }
        for _ in range(texts)
    ]
    found = in_turns({family: stage.run for family, stage in stages.items()}, calls, rounds)
    seconds = {family: np.median(timed.seconds, axis=1) for family, timed in found.items()}
    return {
        family: {"ms": float(1000 * np.median(times)), "against_bert": spread(times / seconds[_BERT])}
        for family, times in seconds.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=6, help="default: 6")
    add("--hidden", type=int, default=384, help="width, in heads of 64; default: 384")
    add("--tokens", type=int, nargs="+", default=[32, 128], metavar="N", help="lengths of texts; default: 32 128")
    add("--texts", type=int, default=12, help="of each length; default: 12")
    add("--rounds", type=int, default=9, help="after one that warms up; default: 9")
    add("--output", type=Path, default=RESULTS / "families.json", metavar="FILE", help="the JSON report")
    return parser


if __name__ == "__main__":
    run_command(main)
