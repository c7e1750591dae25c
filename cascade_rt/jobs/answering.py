"""Answer the records of a file in order, also where some of them cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from ..errors import InputError, InvalidOption, TextError
from ..io.readers import Example, Reject
from ..io.writers import json_line
from ..runtime import CascadeRuntime
from ..types import Prediction

STOP, SKIP, NULL = "stop", "skip", "null"
ON_ERROR = (STOP, SKIP, NULL)
"""What to do with a record that cannot be used."""

CHUNK = 1024
"""Texts in memory at a time."""

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
    records: Iterable[Example | Reject],
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
    for chunk, complete in _chunks(records):
        for record, prediction in _answered(runtime, chunk):
            if not isinstance(record, Reject):
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
        if complete:
            yield


def _chunks(records: Iterable[Example | Reject]) -> Iterator[tuple[list[Example | Reject], bool]]:
    """Yield the records in chunks; where reading fails, those before it come first, with False."""
    chunk: list[Example | Reject] = []
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == CHUNK:
                yield chunk, True
                chunk = []
    except InputError:
        yield chunk, False
        raise
    if chunk:
        yield chunk, True


def _answered(
    runtime: CascadeRuntime, chunk: list[Example | Reject]
) -> Iterator[tuple[Example | Reject, Prediction | None]]:
    """Yield each record with its prediction; a text that the runtime cannot use becomes a rejected record."""
    records = list(chunk)
    waiting = [place for place, record in enumerate(records) if isinstance(record, Example)]
    predictions: dict[int, Prediction] = {}
    while waiting:
        examples = [record for place in waiting if isinstance(record := records[place], Example)]
        try:
            predictions = dict(zip(waiting, runtime.predict(example.text for example in examples), strict=True))
        except TextError as error:
            bad, example = waiting.pop(error.index), examples[error.index]
            found = TextError(error.index, error.reason, example.where)
            found.__cause__ = error
            row = json.dumps(example.fields, default=str) if example.fields else str(example.text)
            records[bad] = Reject(example.where, error.reason, row, found, example.fields)
        else:
            break
    for place, record in enumerate(records):
        yield record, predictions.get(place)
