"""Answers on ARM64 beside those on this CPU: the same labels and exits, and probabilities within a bound.

.ci/arm64 runs both parts, the second on emulated CPUs, where only the runtime is installed:

python -m tests.arm64 expect FOLDER
python tests/arm64.py compare FOLDER CPU all|quick
"""

from __future__ import annotations

import io
import json
import random
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cascade_rt import CascadeRuntime, Prediction
from cascade_rt.benchmark.machine import describe
from cascade_rt.cli import main as cascade_rt

BOUNDS = {"fp32": 1e-5, "int8": 0.03}
"""Largest difference of a probability from x86's. In int8, a last digit can round to another integer."""
_SHAPES = [(2, 384), (4, 384)]
_TEXTS = {"all": {"fp32": 52, "int8": 208}, "quick": {"fp32": 4, "int8": 12}}
"""So many are compared: without the CPU's own units, a text takes seconds in fp32."""
_ALONE = 2
"""Texts that are also read alone, and by the command."""


def expect(folder: Path) -> None:
    """Write a cascade in each precision, texts, and the answers of this CPU."""
    from cascade_export.export import export_bundle
    from cascade_train.smart_home import load

    folder.mkdir(parents=True, exist_ok=True)
    texts = [str(text) for text, _ in load("heldout")]
    random.Random(0).shuffle(texts)
    expected: dict[str, Any] = {"processor": describe()["processor"], "texts": texts}
    with TemporaryDirectory() as made:
        members = _members(Path(made))
        for precision in BOUNDS:
            bundle = folder / precision
            export_bundle(members, bundle, precision=precision, max_length=64, overwrite=True)
            with CascadeRuntime(bundle) as runtime:
                threshold = _between([answer.score for answer in runtime.with_thresholds(0.0).predict(texts)])
                answers = runtime.with_thresholds(threshold).predict(texts)
            expected[precision] = {
                "threshold": threshold,
                "answers": [answer._asdict() for answer in answers],
                "info": _printed("info", "--model-dir", str(bundle)),
            }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def _members(folder: Path) -> list[str]:
    """Write random encoders over the words of the smart home, with classifiers fitted to some of its texts."""
    import torch
    from cascade_export.random_weights import write_random_members
    from cascade_train.smart_home import LABELS, load
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertForSequenceClassification, BertTokenizerFast

    from .toy import vocabulary

    rows = [(str(text), LABELS.index(label)) for text, label in load("train")]
    words = sorted({word for text, _ in rows for word in text.lower().split() if word.isalpha()})
    tokenizer = BertTokenizerFast(tokenizer_object=BertWordPieceTokenizer(vocabulary(words))._tokenizer)
    tokenizer.save_pretrained(folder)
    members = write_random_members(_SHAPES, folder, tokenizer=str(folder), labels=len(LABELS))
    random.Random(0).shuffle(rows)
    texts, labels = zip(*rows[:600], strict=True)
    wanted = torch.nn.functional.one_hot(torch.tensor(labels)).float()
    for member in members:
        model = BertForSequenceClassification.from_pretrained(member).eval()
        with torch.no_grad():
            pooled = model.bert(**tokenizer(list(texts), padding=True, return_tensors="pt")).pooler_output
            centred, targets = pooled - pooled.mean(dim=0), wanted - wanted.mean(dim=0)
            square = centred.T @ centred
            ridge = square.diag().mean() * torch.eye(len(square))
            weight = 6 * torch.linalg.solve(square + ridge, centred.T @ targets).T
            model.classifier.weight.copy_(weight)
            model.classifier.bias.copy_(-weight @ pooled.mean(dim=0))
        model.save_pretrained(member)
    return members


def compare(folder: Path, cpu: str, mode: str) -> bool:
    """Answer some of the texts on this CPU, print how far that is from what was expected, and return if it is right."""
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    right = True
    for precision, bound in BOUNDS.items():
        started, texts = time.process_time(), _TEXTS[mode][precision]
        wanted = [Prediction(**answer) for answer in expected[precision]["answers"][:texts]]
        threshold, written = expected[precision]["threshold"], expected["texts"][:texts]
        with CascadeRuntime(folder / precision) as opened:
            runtime = opened.with_thresholds(threshold)
            found = runtime.predict(written)
            alone = [runtime.predict([text])[0] for text in written[:_ALONE]]
        labels = sum(one.label != other.label for one, other in zip(found, wanted, strict=True))
        exits = sum(one.exit != other.exit for one, other in zip(found, wanted, strict=True))
        far, apart = _distance(found, wanted), _distance(alone, found[:_ALONE])
        shown = _printed("info", "--model-dir", str(folder / precision)) == expected[precision]["info"]
        command = ["predict", "--model-dir", str(folder / precision), "--threshold", str(threshold), *written[:_ALONE]]
        lines = [json.loads(line) for line in _printed(*command).splitlines()]
        said = [(line["label"], line["exit"]) for line in lines] == [(one.label, one.exit) for one in wanted[:_ALONE]]
        good = not labels and not exits and shown and said and max(far, apart) <= bound
        right = right and good
        print(
            f"{cpu} ({describe()['processor']}), {precision}: {len(found)} texts, "
            f"{sum(one.exit for one in found)} continue; unlike x86: {labels} labels, {exits} exits, "
            f"probabilities by {far:.1e} at most (bound {bound:.0e}); alone by {apart:.1e}; "
            f"info {'equal' if shown else 'NOT equal'}, predict {'equal' if said else 'NOT equal'}; "
            f"{time.process_time() - started:.0f} s: {'passed' if good else 'FAILED'}",
            flush=True,
        )
    return right


def _between(scores: list[float]) -> float:
    """Return the middle of the widest gap among the middle half: rounding then decides no exit."""
    middle = np.sort(scores)[len(scores) // 4 : -len(scores) // 4]
    at = int(np.diff(middle).argmax())
    return float(middle[at] + middle[at + 1]) / 2


def _distance(some: list[Prediction], others: list[Prediction]) -> float:
    one, other = (np.array([answer.probabilities for answer in answers]) for answers in (some, others))
    return float(np.abs(one - other).max())


def _printed(*command: str) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        status = cascade_rt(list(command))
    assert not status, f"{command} ended with {status}"
    return printed.getvalue()


if __name__ == "__main__":
    if sys.argv[1] == "expect":
        expect(Path(sys.argv[2]))
    else:
        sys.exit(not compare(Path(sys.argv[2]), *sys.argv[3:5]))
