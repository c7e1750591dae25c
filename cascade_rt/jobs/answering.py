"""Answer the records of a file in order, also where some of them cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from ..errors import InputError, InvalidOption, TextError
from ..io.readers import Example, Reject
from ..io.writers import json_line
from ..runtime import CascadeRuntime
from ..types import Prediction, Text

STOP, SKIP, NULL = "stop", "skip", "null"
ON_ERROR = (STOP, SKIP, NULL)
"""What to do with a record that cannot be used."""

CHUNK = 1024
"""Texts in memory at a time."""

Record = Example | Reject
Answers = TypeVar("Answers")
_FIELDS = ("label", "score", "exit", "layers", "truncated")


@dataclass
class Counts:
    """How many records a job has seen so far."""

    answered: int = 0
    rejected: int = 0

    @property
    def records(self) -> int:
        """Both."""
        return self.answered + self.rejected


def answer(
    runtime: CascadeRuntime,
    records: Iterable[Record],
    output: TextIO,
    counts: Counts,
    *,
    on_error: str = STOP,
    rejects: TextIO | None = None,
) -> Iterator[None]:
    """Write one line of JSON for each record, in order, and count it; yield after each chunk that was read in full.

    A record that cannot be used ends the job with InputError, after everything before it was written (STOP), is left
    out (SKIP), or gets a line with nulls and the reason as `error` (NULL). Each is also written to `rejects` with its
    position and the reason.
    """
    if on_error not in ON_ERROR:
        raise InvalidOption("on_error", on_error, f"one of {', '.join(ON_ERROR)}")
    for chunk, complete in chunks(records, CHUNK):
        found, predictions = usable(chunk, runtime.predict)
        write_answers(found, predictions, output, counts, on_error=on_error, rejects=rejects)
        if complete:
            yield


def write_answers(
    records: Iterable[Record],
    predictions: Iterable[Prediction],
    output: TextIO,
    counts: Counts,
    *,
    on_error: str,
    rejects: TextIO | None,
) -> None:
    """Write the lines of records, and count them; `predictions`: of the examples among them, in order.

    Raises the error of the first record that cannot be used after those before it were written (STOP).
    """
    answers = iter(predictions)
    for record in records:
        if not isinstance(record, Reject):
            prediction = next(answers)
            output.write(json_line(record.fields, {name: getattr(prediction, name) for name in _FIELDS}))
            counts.answered += 1
            continue
        if on_error == STOP:
            raise record.error
        counts.rejected += 1
        if on_error == NULL:
            output.write(json_line(record.fields, {**dict.fromkeys(_FIELDS), "error": record.reason}))
        if rejects is not None:
            line = {"where": record.where, "reason": record.reason, "row": record.row}
            rejects.write(json.dumps(line, ensure_ascii=False) + "\n")


def described(runtime: CascadeRuntime, on_error: str) -> dict[str, Any]:
    """Return what decides the answers to the same records: a job that is resumed must share it."""
    return {
        "bundle": runtime.bundle.sha256,
        "members": [member.name for member in runtime.bundle.members],
        "thresholds": runtime.thresholds,
        "exit_rule": dict(runtime.bundle.exit_rule),
        "on_error": on_error,
    }


def chunks(records: Iterable[Record], size: int) -> Iterator[tuple[list[Record], bool]]:
    """Yield the records in chunks; where reading fails, those before it come first, with False."""
    chunk: list[Record] = []
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == size:
                yield chunk, True
                chunk = []
    except InputError:
        yield chunk, False
        raise
    if chunk:
        yield chunk, True


def usable(chunk: Sequence[Record], run: Callable[[list[Text]], Answers]) -> tuple[list[Record], Answers]:
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
            row = json.dumps(example.fields, default=str) if example.fields else str(example.text)
            records[places[error.index]] = Reject(example.where, error.reason, row, found, example.fields)
