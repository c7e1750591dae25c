"""Answer the records of a file in order, also where some of them cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO, TypeVar

from ..engine.backends import out_of_memory
from ..engine.task import Task
from ..errors import CascadeError, InferenceError, InputError, InvalidOption, TextError
from ..io.readers import Example, Reject
from ..io.writers import json_line
from ..runtime import CascadeRuntime
from ..types import Prediction, Text

STOP, SKIP, NULL = "stop", "skip", "null"
ON_ERROR = (STOP, SKIP, NULL)
"""Ways to treat a record that cannot be used."""

CHUNK = 1024
"""Texts in memory at a time."""

Record = Example | Reject
Answers = TypeVar("Answers")
FIELDS = ("label", "score", "exit", "layers", "truncated")
"""Fields that an answer adds to those of a record."""
ALL_FIELDS = (*FIELDS, "labels")
"""Those of a task with several labels per text."""

_PROBES = 8  # texts that a member must fail on before it is taken to be broken


@dataclass
class Counts:
    """Numbers of the records that a job has seen so far."""

    answered: int = 0
    rejected: int = 0

    @property
    def records(self) -> int:
        """Answered plus rejected."""
        return self.answered + self.rejected


Progress = Callable[[Counts], object]
"""A function that is called with the counts after each chunk or part of a job."""


@dataclass
class Lines:
    """The lines of a job: streams for them, and the counts of the records that they cover.

    A record that cannot be used, or whose text a member cannot run, ends the job with its error, after everything
    before it was written (STOP), is left out (SKIP), or gets a line with nulls and the reason as `error` (NULL). Each
    is also written to `rejects` with its position and the reason.
    """

    output: TextIO
    rejects: TextIO | None
    on_error: str
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        """Raise InvalidOption for an unknown way to treat records."""
        check_on_error(self.on_error)

    def write(self, records: Iterable[Record], predictions: Iterable[Prediction], task: Task) -> None:
        """Write one line of JSON for each record, and count it; `predictions`: of the examples among them, in order."""
        answers, fields = iter(predictions), ALL_FIELDS if task.several else FIELDS
        taken = (*fields, "error") if self.on_error == NULL else fields
        for record in records:
            if not isinstance(record, Reject):
                prediction = next(answers)
                line = json_line(record.fields, {name: getattr(prediction, name) for name in fields}, taken)
                self.output.write(line)
                self.counts.answered += 1
                continue
            if self.on_error == STOP:
                raise record.error
            self.counts.rejected += 1
            if self.on_error == NULL:
                self.output.write(json_line(record.fields, {**dict.fromkeys(fields), "error": record.reason}))
            if self.rejects is not None:
                rejected = {"where": record.where, "reason": record.reason, "row": record.row}
                self.rejects.write(json.dumps(rejected, ensure_ascii=False) + "\n")


def check_on_error(found: str) -> None:
    """Raise InvalidOption for what is not one of ON_ERROR."""
    if found not in ON_ERROR:
        raise InvalidOption("on_error", found, f"one of {', '.join(ON_ERROR)}")


def answer(
    runtime: CascadeRuntime, records: Iterable[Record], lines: Lines, progress: Progress = lambda counts: None
) -> None:
    """Write the lines of all records, in order; call `progress` after each chunk of them.

    Raises InferenceError where a member fails on all texts.
    """
    for chunk in chunks(records, CHUNK):
        for found, predictions in answered(chunk, runtime, runtime.predict):
            lines.write(found, predictions, runtime.task)
        progress(lines.counts)


def described(runtime: CascadeRuntime, on_error: str) -> dict[str, Any]:
    """Return what decides the answers to the same records: a job that is resumed must share it."""
    windows = runtime.plan.windows
    found = {
        "bundle": runtime.bundle.sha256,
        "members": [member.name for member in runtime.bundle.members],
        "thresholds": runtime.thresholds,
        "exit_rule": {"kind": runtime.exit_rule.kind, **runtime.exit_rule.settings},
        "on_error": on_error,
        **(dict.fromkeys(("stride", "aggregate")) if windows is None else asdict(windows)),
    }
    as_written: dict[str, Any] = json.loads(json.dumps(found))  # as the checkpoint has it
    return as_written


def chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Yield the records in chunks; where reading fails, those before it come first."""
    chunk: list[Record] = []
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except InputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def answered(
    chunk: Sequence[Record], runtime: CascadeRuntime, run: Callable[[list[Text]], Answers]
) -> Iterator[tuple[list[Record], Answers]]:
    """Yield what `run` makes of the texts, with their records, in order: all at once, or in parts where a member fails.

    A record whose text cannot be used, or fails even alone, becomes a rejected one. Raises the InferenceError of a
    member that is broken, or has no memory left.
    """
    try:
        yield _usable(chunk, run)
    except InferenceError as error:
        texts = [record.text for record in chunk if isinstance(record, Example)]
        if out_of_memory(error.__cause__) or not _works(runtime, texts):
            raise
        yield from _parts(list(chunk), run, error)


def _parts(
    records: list[Record], run: Callable[[list[Text]], Answers], error: InferenceError
) -> Iterator[tuple[list[Record], Answers]]:
    """Yield as `answered` does, by halves of records among which some have failed with `error`."""
    if len(records) == 1 and isinstance(record := records[0], Example):
        found = InferenceError(f"{record.where}: {error}")
        found.__cause__ = error
        records = [_rejected(record, str(error), found)]
    if all(isinstance(record, Reject) for record in records):
        yield _usable(records, run)
        return
    middle = len(records) // 2
    for half in (records[:middle], records[middle:]):
        try:
            part = _usable(half, run)
        except InferenceError as failure:
            if out_of_memory(failure.__cause__):
                raise
            yield from _parts(half, run, failure)
        else:
            yield part


def _works(runtime: CascadeRuntime, texts: Sequence[Text]) -> bool:
    """Return whether all members can run some text: one that is empty, or one of several."""
    empty: Text = ("", "") if runtime.bundle.pair else ""
    for text in [empty, *texts[:: -(-len(texts) // _PROBES)]]:
        try:
            runtime.member_logits([text])
        except (InferenceError, TextError):
            continue
        return True
    return False


def _usable(chunk: Sequence[Record], run: Callable[[list[Text]], Answers]) -> tuple[list[Record], Answers]:
    """Return what `run` makes of the texts, and the records; one whose text raises TextError becomes a rejected one."""
    records = list(chunk)
    while True:
        places = [place for place, record in enumerate(records) if isinstance(record, Example)]
        examples = [record for record in records if isinstance(record, Example)]
        try:
            return records, run([example.text for example in examples])
        except TextError as error:
            example = examples[error.index]
            found = TextError(error.index, error.reason, example.where)
            found.__cause__ = error
            records[places[error.index]] = _rejected(example, error.reason, found)


def _rejected(example: Example, reason: str, error: CascadeError) -> Reject:
    row = json.dumps(example.fields, default=str) if example.fields else str(example.text)
    return Reject(example.where, reason, row, error, example.fields)
