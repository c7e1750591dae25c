"""Label the training instances that are difficult for a member's architecture (paper, section 3.3), for DAR.

The training set is split into K folds; for each fold a member is trained on the other K - 1 and predicts it, and this
is repeated for S seeds. An instance is easy only if every seed got it right. Each fold's predictions are stored as
soon as they are computed, so a killed run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from cascade_rt.engine.cpus import usable_cpus
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.writers import write_json
from cascade_train.finetune import (
    LABELS_ALONE,
    ObjectiveTrainer,
    Recipe,
    arguments,
    freeze,
    load_base,
)
from cascade_train.inference import answers, collator, features
from cascade_train.ranges import check_ranges
from cascade_train.tasks import Examples, TaskData, strata_of
from cascade_train.work import claim, work_folder

LABELS_FILE = "difficulty.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Splits:
    """Splits of a training set into folds, one for each seed; the defaults are the paper's."""

    folds: int = 8
    seeds: int = 5

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        check_ranges(self, {"folds": (2, 1e6), "seeds": (1, 1e6)})


SPLITS = Splits()


@dataclass(frozen=True)
class _Run:
    """Settings that the training of every fold shares."""

    base: str
    data: TaskData
    layers: int | None
    tokenizer: str | None
    recipe: Recipe
    splits: Splits
    work: Path

    def part(self, seed: int, fold: int) -> Path:
        """Return the file of a fold's predictions."""
        return self.work / f"seed-{seed}-fold-{fold}.json"


def label_difficulty(
    base: str,
    data: TaskData,
    output: Path,
    *,
    layers: int | None = None,
    tokenizer: str | None = None,
    recipe: Recipe,
    splits: Splits = SPLITS,
    jobs: int = 1,
) -> dict[str, Any]:
    """Label every training instance of `data` as easy or difficult for `base`'s first `layers` layers.

    Writes a folder: `difficulty.jsonl`, per instance its row number `id`, `label`, the `predictions` of every seed and
    `difficulty` 0 or 1, and `summary.json`, which is returned: the share of difficult instances, in all and per
    class, and what was trained. `tokenizer` is that of `finetune`. `jobs` folds are trained in parallel, each with its
    share of the CPUs. Raises InputError if `output` exists or a class has fewer instances than there are folds.
    """
    work = work_folder(output, "label", "labelling")
    if jobs < 1:
        raise InvalidOption("jobs", jobs, "at least 1")
    rarest = min(Counter(strata_of(data.train.labels)).values(), default=0)
    if rarest < splits.folds:
        raise InvalidOption("folds", splits.folds, f"at most {rarest}, the training instances of the rarest class")
    run = _Run(base, data, layers, tokenizer, recipe, splits, work)
    settings = {
        "base": str(base),
        "layers": layers,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "task": data.name,
        "labels": list(data.labels),
        "recipe": asdict(recipe),
        **asdict(splits),
        "train": data.train.described(),
    }
    claim(work, settings, "seed-*.json")
    parts = [(seed, fold) for seed in range(splits.seeds) for fold in range(splits.folds)]
    missing = [part for part in parts if not run.part(*part).is_file()]
    with tqdm(
        total=len(parts),
        initial=len(parts) - len(missing),
        unit=" folds",
        desc=f"labelling {output.name}",
        disable=None,
    ) as progress:
        for _ in _trained(run, missing, jobs):
            progress.update()
    finished = work / "finished"
    finished.mkdir(exist_ok=True)
    summary = settings | _collected(run, finished / LABELS_FILE)
    write_json(finished / SUMMARY_FILE, summary)
    finished.rename(output)
    shutil.rmtree(work)
    return summary


def read_difficulty(folder: Path, train: Examples) -> list[int]:
    """Return the difficulty, 0 or 1, of each training example; raise InputError for labels of other examples."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text("utf-8"))
        rows = [json.loads(line) for line in (folder / LABELS_FILE).read_text("utf-8").splitlines()]
        found = {row["id"]: row["difficulty"] for row in rows}
        of = summary["train"]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no difficulty labels ({error}); make them with cascade-rt difficulty") from error
    if of != train.digest() or set(found) != set(range(len(train))) or not set(found.values()) <= {0, 1}:
        raise InputError(
            f"{folder}: labels of {len(found)} other training examples than these {len(train)}; use the same task, "
            "the holdout and split seed as in cascade-rt difficulty"
        )
    return [found[row] for row in range(len(train))]


def _trained(run: _Run, missing: list[tuple[int, int]], jobs: int) -> Iterator[None]:
    """Train these folds, in this process or in others; yield when each one ends."""
    if jobs == 1:
        for seed, fold in missing:
            _train_fold(run, seed, fold)
            yield
        return
    threads = max(1, usable_cpus() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_train_fold, run, seed, fold, threads) for seed, fold in missing]
        try:
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_fold(run: _Run, seed: int, fold: int, threads: int | None = None) -> None:
    """Train on all folds but one, and store the predictions of that one: [row, class id], or [row, class ids]."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    train = run.data.train
    split = StratifiedKFold(run.splits.folds, shuffle=True, random_state=seed)
    kept, held = list(split.split(np.zeros(len(train)), strata_of(train.labels)))[fold]
    recipe = replace(run.recipe, seed=run.recipe.seed + 1000 * seed + fold)
    set_seed(recipe.seed)
    data = run.data
    tokenizer, model = load_base(run.base, data.labels, run.layers, run.tokenizer, several=data.several)
    freeze(model, recipe)
    with TemporaryDirectory(prefix="cascade-fold-") as folder:
        trainer = ObjectiveTrainer(
            LABELS_ALONE,
            model=model,
            args=arguments(recipe, Path(folder), eval_strategy="no", save_strategy="no", logging_strategy="no"),
            train_dataset=features(tokenizer, model, train.take(kept), recipe.max_length),
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = features(tokenizer, model, train.take(held), recipe.max_length)
    logits = answers(tokenizer, model, rows)
    predictions = [np.flatnonzero(row > 0).tolist() for row in logits] if data.several else logits.argmax(-1).tolist()
    write_json(run.part(seed, fold), list(zip(held.tolist(), predictions, strict=True)))


def _collected(run: _Run, target: Path) -> dict[str, Any]:
    """Write the labels of all instances; return their shares."""
    data, seeds = run.data, range(run.splits.seeds)
    found: list[list[Any]] = [[None] * len(seeds) for _ in data.train.labels]
    for seed in seeds:
        for fold in range(run.splits.folds):
            for row, answer in json.loads(run.part(seed, fold).read_text("utf-8")):
                found[row][seed] = tuple(answer) if data.several else answer
    if any(None in some for some in found):
        raise CascadeError(f"{run.work}: some folds lack predictions; delete the folder and label again")

    def named(answer: Any) -> Any:
        return [data.labels[index] for index in answer] if data.several else data.labels[answer]

    labelled = zip(found, data.train.labels, strict=True)
    right = np.array([[answer == label for answer in some] for some, label in labelled], dtype=bool)
    difficult: NDArray[np.bool_] = np.logical_not(right.all(axis=1))
    with target.open("w", encoding="utf-8", newline="\n") as stream:
        for row, label in enumerate(data.train.labels):
            fields = {
                "id": row,
                "label": named(label),
                "predictions": [named(answer) for answer in found[row]],
                "difficulty": int(difficult[row]),
            }
            stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    has = data.task.indicators(data.train.answers(len(data.labels)), len(data.labels))
    return {
        "difficult": float(difficult.mean()),
        "difficult_by_class": {name: float(difficult[has[:, index]].mean()) for index, name in enumerate(data.labels)},
        "accuracy_by_seed": right.mean(axis=0).tolist(),
    }
