"""Training data: the paper's six GLUE tasks by name, the built-in demo task, or any labelled file.

Every loader returns a `TaskData`: training and validation examples with class ids, the label names (index = class id),
pair or single, and the metric. The task's official dev set is never used for training or for choosing thresholds:
validation is held out of the training file.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt.engine.task import MultiLabel, SingleLabel, Task
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io.fields import is_blank, label_order
from cascade_rt.io.readers import AS_USUAL, LABEL, LABELS, Reading, Reject, read_examples, read_records
from cascade_rt.io.writers import json_line, open_output
from cascade_rt.tuning.evaluation import label_ids
from cascade_rt.types import Text
from cascade_train import smart_home

_MANY_LABELS = 20


@dataclass(frozen=True)
class Examples:
    """Texts (or pairs) and their class ids: of each text one, int, or with several labels all, in a tuple.

    A teacher's answers, with several labels, are a list: the probability of each label.
    """

    texts: Sequence[Text]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def answers(self, labels: int) -> NDArray[Any]:
        """Return the class ids, int (texts,), or with several labels which of all, bool (texts, labels)."""
        if not any(isinstance(label, tuple) for label in self.labels):
            return np.array(self.labels, dtype=np.intp)
        return np.array([[index in some for index in range(labels)] for some in self.labels])

    def take(self, rows: Iterable[int]) -> Examples:
        """Return the examples at these indices, in this order."""
        rows = list(rows)
        return Examples([self.texts[row] for row in rows], [self.labels[row] for row in rows])

    def described(self) -> dict[str, Any]:
        """Return the number of examples and their hash, for a record."""
        return {"rows": len(self), "sha256": self.digest()}

    def digest(self) -> str:
        """Return the sha256 of texts and labels, which identifies a data set."""
        return hashlib.sha256(repr((list(self.texts), list(self.labels))).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class TaskData:
    """The data of one task."""

    name: str
    labels: tuple[str, ...]
    pair: bool
    metric: str
    train: Examples
    validation: Examples
    nested: bool = False
    """True if training texts are phrases of one another, as SST-2's are."""
    several: bool = False
    """True if a text has any number of labels."""

    @property
    def task(self) -> Task:
        """The meaning of answers; several labels are cut at 0.5."""
        return MultiLabel((0.5,) * len(self.labels)) if self.several else SingleLabel()

    def described(self) -> dict[str, Any]:
        """Return the examples' numbers and hashes, for a record."""
        return {"train": self.train.described(), "validation": self.validation.described()}


@dataclass(frozen=True)
class GlueTask:
    """The layout of a GLUE task's official files."""

    columns: tuple[str, ...]
    label_column: str
    labels: Mapping[str, str]  # as the file writes a label -> label name, in the order of the class ids
    train: tuple[str, ...]  # file names to try, official one first
    dev: Mapping[str, tuple[str, ...]]  # split name -> file names to try
    metric: str = "accuracy"
    nested: bool = False  # training rows are phrases of one another
    skip_malformed: bool = False

    @property
    def pair(self) -> bool:
        """True if an instance is a pair of texts."""
        return len(self.columns) == 2


_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_DEV = {"dev": ("dev.tsv",)}

GLUE: dict[str, GlueTask] = {
    "mnli": GlueTask(
        ("sentence1", "sentence2"),
        "gold_label",
        {label: label for label in ("entailment", "neutral", "contradiction")},
        ("train.tsv",),
        {"dev_matched": ("dev_matched.tsv",), "dev_mismatched": ("dev_mismatched.tsv",)},
    ),
    "mrpc": GlueTask(
        ("#1 String", "#2 String"),
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        ("train.tsv", "msr_paraphrase_train.txt"),
        {"dev": ("dev.tsv", "msr_paraphrase_test.txt")},
        metric="f1",
    ),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILMENT, ("train.tsv",), _DEV),
    "qqp": GlueTask(
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        ("train.tsv",),
        _DEV,
        metric="f1",
        skip_malformed=True,
    ),
    "rte": GlueTask(("sentence1", "sentence2"), "label", _ENTAILMENT, ("train.tsv",), _DEV),
    "sst-2": GlueTask(("sentence",), "label", {"0": "negative", "1": "positive"}, ("train.tsv",), _DEV, nested=True),
}

SMART_HOME = "smart-home"
TASKS = (*GLUE, SMART_HOME)


def load_task(name: str, folder: Path | None, *, holdout: float = 0.1, split_seed: int = 0) -> TaskData:
    """Load a task by name; `folder` holds its official files (the built-in task needs none).

    A share `holdout` of the training examples becomes validation; the split depends on `split_seed` alone, so all
    members of a cascade see the same one. Raises InputError for an unknown task or an incomplete folder.
    """
    if name == SMART_HOME:
        kept, held = hold_out(load_part("train"), holdout, split_seed)
        return TaskData(name, smart_home.LABELS, False, "accuracy", kept, held)
    task = _glue(name)
    examples = _read_glue(task, folder, task.train)
    kept, held = hold_out(examples, holdout, split_seed, nested=task.nested)
    return TaskData(name, tuple(task.labels.values()), task.pair, task.metric, kept, held, task.nested)


def load_evaluation(name: str, folder: Path | None) -> dict[str, Examples]:
    """Load the sets that a task is reported on: its dev sets by name (MNLI has two), or the demo's held-out texts."""
    if name == SMART_HOME:
        return {"heldout": load_part("heldout")}
    task = _glue(name)
    return {split: _read_glue(task, folder, files) for split, files in task.dev.items()}


def load_part(part: str) -> Examples:
    """Load a part of the built-in task: "train", "tuning" or "heldout"."""
    return _indexed([(text, [label], part) for text, label in smart_home.load(part)], smart_home.LABELS)


def load_file(
    path: Path,
    *,
    validation: Path | None = None,
    reading: Reading = AS_USUAL,
    pair: bool = False,
    metric: str | None = None,
    holdout: float = 0.1,
    split_seed: int = 0,
    skipped: list[str] | None = None,
) -> TaskData:
    """Load any labelled csv, tsv, jsonl or parquet file with named columns, as `reading` says.

    Texts have several labels if `reading` or the file's first record says so (`Reading.lists_labels`). Class ids follow
    the labels in the order of `fields.label_order`, numbers by value, then the others by spelling; or their columns.
    `metric`: "accuracy" or "f1"; None for the F1 of several labels, else accuracy. Without a `validation` file a share
    `holdout` of the rows is held out. A row without a text or a label, or one that cannot be read, raises InputError;
    with a list `skipped`, it is left out, and the reason is appended.
    """
    several = _has_several(path, reading, pair)
    rows = _read_labelled(path, reading, pair, skipped, several)
    names = reading.label_columns or tuple(sorted({name for _, found, _ in rows for name in found}, key=label_order))
    if len(names) < 2:
        without = f" ({len(skipped)} rows were left out, the first: {skipped[0]})" if skipped else ""
        raise InputError(
            f"{path}: found the label(s) {', '.join(names) or 'none'}{without}, expected at least two different ones"
        )
    train = _indexed(rows, names, several)
    if validation is None and len(names) > max(_MANY_LABELS, len(rows) // 2):
        raise InputError(
            f"{path}: found {len(names):,} different labels in {len(rows):,} rows of the column "
            f"{reading.label_column or LABEL!r} "
            f"({', '.join(repr(name[:40]) for name in names[:3])}, ...), expected several texts of each; name the "
            "column of the labels"
        )
    if validation is None:
        train, held = hold_out(train, holdout, split_seed)
    else:
        held = _indexed(_read_labelled(validation, reading, pair, skipped, several), names, several)
        if not held:
            raise InputError(f"{validation}: no rows; validation needs some")
    return TaskData(path.stem, names, pair, metric or ("f1" if several else "accuracy"), train, held, several=several)


def reserve(data: TaskData, share: float, seed: int) -> tuple[TaskData, Examples, Examples]:
    """Take two more parts out of the training examples: one to choose thresholds on, one to certify the choice.

    Each is about `share` of the training examples and of the validation examples together (of the whole texts, where
    texts are nested). Returns the data without them, and the two parts.
    """
    kept, held = hold_out(data.train, 2 * share / (1 - share), seed, nested=data.nested)
    tuning, certification = hold_out(held, 0.5, seed)
    return replace(data, train=kept), tuning, certification


def hold_out(examples: Examples, share: float, seed: int, *, nested: bool = False) -> tuple[Examples, Examples]:
    """Split into (kept, held out), stratified by label; of several labels, by the rarest that a text has.

    With `nested` only whole texts, which are not a phrase of another text, are held out, together with all their
    phrases. SST-2 trains on the phrases of its sentences: a random split would validate on fragments of training
    sentences, which are shorter and easier than the dev set.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - slow to import

    if not 0 < share < 1:
        raise InvalidOption("holdout", share, "a number between 0 and 1 (0.1 is usual)")
    if not 0 <= seed < 2**32:
        raise InvalidOption("split_seed", seed, f"a number from 0 to {2**32 - 1}")
    candidates = _whole_texts(examples.texts) if nested else list(range(len(examples)))
    strata = strata_of([examples.labels[row] for row in candidates])
    counts = Counter(strata)
    rarest = min(counts.values(), default=0)
    if rarest < 2 or math.ceil(share * len(candidates)) < len(counts):
        raise InputError(
            f"cannot hold out {share:.0%} of {len(candidates)} examples with each of the {len(counts)} labels in both "
            f"parts (the rarest label has {rarest}); add examples, hold out more, or give the part as a file"
        )
    try:
        _, held = train_test_split(
            candidates,
            test_size=share,
            random_state=seed,
            stratify=strata,
        )
    except ValueError as error:
        raise InputError(
            f"cannot hold out {share:.0%} of {len(candidates)} examples with every label in both parts ({error}); "
            "add examples of the rare labels, or give the part as a file"
        ) from error
    gone = set(held)
    if nested:
        phrases = {phrase for row in held for phrase in _phrases(examples.texts[row])}
        gone |= {row for row, text in enumerate(examples.texts) if _words(text) in phrases}
    return examples.take(row for row in range(len(examples)) if row not in gone), examples.take(sorted(held))


def strata_of(labels: Sequence[Any]) -> list[int]:
    """Return the class by which each example is stratified: its label, or of several the rarest; -1 for none.

    With several labels, a class of one example joins the largest.
    """
    counts = Counter(label for some in labels for label in (some if isinstance(some, tuple) else (some,)))
    if not any(isinstance(some, tuple) for some in labels):
        return list(labels)
    strata = [min(some, key=lambda label: (counts[label], label), default=-1) for some in labels]
    sizes = Counter(strata)
    largest = max(sizes, key=lambda stratum: sizes[stratum])
    return [stratum if sizes[stratum] > 1 else largest for stratum in strata]


def write_examples(path: Path, examples: Examples, labels: Sequence[str]) -> None:
    """Write examples as JSON lines with the fields text, text_pair (of pairs) and label or labels, atomically."""
    with open_output(path) as stream:
        for text, label in zip(examples.texts, examples.labels, strict=True):
            fields = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
            several = isinstance(label, tuple)
            answer = {LABELS: [labels[index] for index in label]} if several else {LABEL: labels[label]}
            stream.write(json_line(fields, answer))


def _whole_texts(texts: Sequence[Text]) -> list[int]:
    """Return the first row of every text that is not a phrase of a longer one."""
    seen: set[tuple[str, ...]] = set()
    whole = []
    for row in sorted(range(len(texts)), key=lambda row: -len(_words(texts[row]))):
        if _words(texts[row]) not in seen:
            whole.append(row)
            seen |= _phrases(texts[row])
    return sorted(whole)


def _phrases(text: Text) -> set[tuple[str, ...]]:
    words = _words(text)
    return {words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1)}


def _words(text: Text) -> tuple[str, ...]:
    return tuple((text if isinstance(text, str) else " ".join(text)).split())


def _glue(name: str) -> GlueTask:
    if name not in GLUE:
        raise InvalidOption("task", name, f"one of {', '.join(TASKS)}")
    return GLUE[name]


def _read_glue(task: GlueTask, folder: Path | None, files: Sequence[str]) -> Examples:
    if folder is None:
        raise InputError("this task reads its official files: give their folder as the data")
    path = next((folder / file for file in files if (folder / file).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: found no {' or '.join(files)}; expected the task's official files there")
    ids = {written: index for index, written in enumerate(task.labels)}
    texts, labels = [], []
    reading = Reading("tsv", task.columns, task.label_column, skip_malformed=task.skip_malformed)
    for example in read_examples(path, reading, pair=task.pair):
        written = reading.label_of(example)
        if written not in ids:
            if written == "-":  # MNLI's mark for pairs without a gold label
                continue
            raise InputError(f"{example.where}: found the label {written!r}, expected one of {', '.join(ids)}")
        texts.append(example.text)
        labels.append(ids[written])
    return Examples(texts, labels)


def _has_several(path: Path, reading: Reading, pair: bool) -> bool:
    """Return whether the texts of a file have several labels, by its first usable record."""
    first = next((record for record in read_records(path, reading, pair=pair) if not isinstance(record, Reject)), None)
    return first is not None and reading.lists_labels(first)


def _read_labelled(
    path: Path, reading: Reading, pair: bool, skipped: list[str] | None, several: bool
) -> list[tuple[Text, list[str], str]]:
    """Return the text, the labels and the position of each row."""
    rows: list[tuple[Text, list[str], str]] = []
    for record in read_records(path, reading, pair=pair):
        try:
            if isinstance(record, Reject):
                raise record.error
            if is_blank(record.text):
                raise InputError(f"{record.where}: found an empty text; leave the row out")
            found = reading.labels_of(record) if several else [reading.label_of(record)]
            rows.append((record.text, found, record.where))
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return rows


def _indexed(rows: Sequence[tuple[Text, list[str], str]], names: Sequence[str], several: bool = False) -> Examples:
    written = [(label, where) for _, found, where in rows for label in found]
    ids = iter(label_ids(written, names, by_number=False, known_by="training has").tolist())
    texts = [text for text, _, _ in rows]
    return Examples(texts, [tuple(sorted(islice(ids, len(found)))) for _, found, _ in rows] if several else list(ids))
