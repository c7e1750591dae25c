"""Out-of-scope texts and n-grams that training has not seen: does lowering the confidence by their share help?

    python benchmarks/unseen_ngrams.py --data DATA/clinc150 --network runs/zero-layers/clinc150/DAN-0/DAN

A network's logits are multiplied by 1 - alpha * (share of a text's tokens and n-grams that no training text has), for
several alphas: with 0 they are as the last layer has them, with 1 as the network gives them. For each, the threshold
lets the same share of the reported texts leave. The report has how many of the texts out of scope stay, and how many
answers of those that leave are right.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cascade_train.averaging import AveragingForSequenceClassification, ngram_rows
from cascade_train.inference import tokenize
from cascade_train.sources import load_classifier, load_tokenizer
from common import RESULTS, Parts, read_parts, run_command
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from cascade_rt.engine.task import SingleLabel
from cascade_rt.io.writers import write_json

ALPHAS = (0.0, 0.25, 0.5, 1.0)
LEAVING = (0.7, 0.8, 0.85)  # of the reported texts
OUT_OF_SCOPE = "oos"


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of CLINC150")
    parser.add_argument("--network", action="append", required=True, metavar="DIR", help="one for each seed")
    parser.add_argument("--output", type=Path, default=RESULTS / "unseen-ngrams.json")
    options = parser.parse_args()
    parts = read_parts("clinc150", options.data)
    report = parts.described() | {"seeds": [_measured(network, parts) for network in options.network]}
    write_json(options.output, report)
    for alpha in map(str, ALPHAS):
        rows = [seed[alpha] for seed in report["seeds"]]
        shown = f"alpha {alpha:4}: out of scope told by confidence, AUC {np.mean([row['auc'] for row in rows]):.4f}"
        for share in map(str, LEAVING):
            kept, right = (np.mean([row[share][key] for row in rows]) for key in ("out_of_scope_kept", "accuracy"))
            shown += f"; {share} leave: {100 * right:.2f}% right, {100 * kept:.1f}% of those out of scope stay"
        print(shown)
    print(f"written: {options.output}")


def _measured(folder: str, parts: Parts) -> dict[str, Any]:
    tokenizer, model = load_tokenizer(folder), load_classifier(folder).eval()
    seen = model.seen.numpy().copy()
    model.seen.fill_(True)
    shares, logits = [], []
    for rows, answer in _rows(tokenizer, model, parts.reported.texts):
        shares.append(1 - seen[rows].mean())
        logits.append(answer)
    task, unseen, labels = SingleLabel(), np.array(shares), np.array(parts.reported.labels)
    outside = labels == parts.data.labels.index(OUT_OF_SCOPE)
    found: dict[str, Any] = {"unseen": {"in_scope": unseen[~outside].mean(), "out_of_scope": unseen[outside].mean()}}
    for alpha in ALPHAS:
        probabilities = task.probabilities(np.array(logits) * (1 - alpha * unseen)[:, None])
        sure, right = task.confidence(probabilities), probabilities.argmax(-1) == labels
        row: dict[str, Any] = {"auc": float(roc_auc_score(~outside, sure))}
        for share in LEAVING:
            leaving = sure > np.quantile(sure, 1 - share)
            row[str(share)] = {
                "accuracy": float(right[leaving].mean()),
                "out_of_scope_kept": float((~leaving)[outside].mean()),
            }
        found[str(alpha)] = row
    return found


def _rows(
    tokenizer: Any, model: AveragingForSequenceClassification, texts: Any
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return each text's rows of the table, and its logits."""
    found = []
    with torch.inference_mode():
        for ids in tokenize(tokenizer, texts, 64)["input_ids"]:
            one = torch.tensor([ids])
            rows, _ = ngram_rows(one, torch.ones_like(one), model.config)
            found.append((rows[0].numpy(), model(one).logits[0].numpy()))
    return found


if __name__ == "__main__":
    run_command(main)
