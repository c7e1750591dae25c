"""The whole journey of a text, top to bottom.

texts -> token ids (once) -> micro-batches by length -> member 1 -> gate -> survivors regrouped -> member 2 ->
... -> predictions in input order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .batching import by_length, micro_batches
from .bundle import Bundle, read_bundle
from .cost import cumulative_layers
from .errors import InputError
from .gate import checked_thresholds, confidence, leaves, softmax
from .member import Member, usable_threads
from .records import Text
from .tokenization import Encoded, TextTokenizer

_EVERYONE = float("-inf")  # the last member's gate


class Prediction(NamedTuple):
    """The answer to one text."""

    label: str
    """Name of the most probable class."""
    score: float
    """Its probability: the confidence of the member that answered."""
    probabilities: tuple[float, ...]
    """Probability of each class, index = class id."""
    exit: int
    """Which member answered, 0-based."""
    layers: int
    """Encoder layers executed for this text, all members that it ran together."""
    truncated: bool
    """Whether the text was longer than the bundle's `max_length` tokens and was cut."""


class CascadeRuntime:
    """A bundle, ready to classify: each text is answered by the smallest member that is confident enough.

    Safe to use from several threads at once.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        thresholds: float | Sequence[float] | None = None,
    ) -> None:
        """Read, verify and load the bundle in `model_dir`.

        `provider`: "cpu", "cuda", or any provider name of the installed ONNX Runtime. `threads`: for each
        member's computation, None for all CPUs that this process may use. `thresholds`: None for the bundle's, a
        float for one tau at every member, or a list, one per member but the last; each in [0, 1].
        Raises BundleError for a bundle that cannot be used and InputError for an argument that cannot.
        """
        self.bundle: Bundle = read_bundle(model_dir)
        folder, entries = Path(model_dir), self.bundle.members
        self.thresholds: list[float] = checked_thresholds(thresholds, self.bundle.thresholds, len(entries))
        self._tokenizer = TextTokenizer(folder / self.bundle.tokenizer_file, self.bundle.max_length, self.bundle.pair)
        count = usable_threads(threads)
        self._members = [
            Member(entry, folder / entry.file, len(self.bundle.labels), provider, count) for entry in entries
        ]
        self._layers = cumulative_layers(entries).tolist()

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """Classify texts, or (text, text pair) tuples for a bundle on pairs; answers in input order.

        Implements the paper's Algorithm 1: a text that left never reaches a bigger member. Raises InputError for
        anything that is not a text (or pair).
        """
        texts = _listed(texts)
        encoded = self._tokenizer.encode(texts)
        probabilities = np.empty((len(texts), len(self.bundle.labels)))
        exits = np.empty(len(texts), dtype=np.intp)
        waiting = by_length(encoded.lengths)
        for index, (member, threshold) in enumerate(zip(self._members, [*self.thresholds, _EVERYONE], strict=True)):
            if not waiting.size:
                break
            probabilities[waiting] = softmax(self._logits(member, encoded, waiting))
            gone = leaves(confidence(probabilities[waiting]), threshold)
            exits[waiting[gone]] = index
            waiting = waiting[~gone]
        return self._predictions(probabilities, exits, encoded)

    def predict_iter(self, texts: Iterable[Text], chunk_size: int = 1024) -> Iterator[Prediction]:
        """Classify a stream in constant memory; answers in input order, a chunk of `chunk_size` texts at a time."""
        if chunk_size < 1:
            raise InputError(f"found a chunk size of {chunk_size}, expected at least 1")
        stream = iter(texts)
        while chunk := list(islice(stream, chunk_size)):
            yield from self.predict(chunk)

    def __call__(self, inputs: Any) -> Any:
        """Answer as a transformers text-classification pipeline does.

        One text (or pair, or {"text": ..., "text_pair": ...}) gives {"label": ..., "score": ...}; a list of them
        gives a list.
        """
        many = isinstance(inputs, list)
        texts = [_from_pipeline(item) for item in (inputs if many else [inputs])]
        answers = [{"label": answer.label, "score": answer.score} for answer in self.predict(texts)]
        return answers if many else answers[0]

    def member_logits(self, texts: Iterable[Text]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Run every member on every text, gates open: what evaluating and choosing thresholds start from.

        Returns the logits, float32 of shape (members, texts, labels), and each text's length in tokens, (texts,).
        """
        encoded = self._tokenizer.encode(_listed(texts))
        rows = by_length(encoded.lengths)
        logits = np.empty((len(self._members), len(rows), len(self.bundle.labels)), dtype=np.float32)
        for index, member in enumerate(self._members):
            logits[index, rows] = self._logits(member, encoded, rows)
        return logits, encoded.lengths

    def _logits(self, member: Member, encoded: Encoded, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Run one member on `rows`, in micro-batches; logits in the order of `rows`."""
        logits = np.empty((len(rows), len(self.bundle.labels)), dtype=np.float32)
        done = 0
        for batch in micro_batches(rows, encoded.lengths):
            logits[done : done + len(batch)] = member.run(encoded.batch(batch))
            done += len(batch)
        return logits

    def _predictions(
        self, probabilities: NDArray[np.float64], exits: NDArray[np.intp], encoded: Encoded
    ) -> list[Prediction]:
        labels = self.bundle.labels
        winners = probabilities.argmax(axis=1).tolist()
        return [
            Prediction(labels[winner], row[winner], tuple(row), exit, self._layers[exit], encoded.truncated(index))
            for index, (row, winner, exit) in enumerate(
                zip(probabilities.tolist(), winners, exits.tolist(), strict=True)
            )
        ]


def _listed(texts: Iterable[Text]) -> list[Text]:
    if isinstance(texts, str | bytes | Mapping):
        raise InputError(f"found one {type(texts).__name__}, expected a list of texts; wrap it: [text]")
    return list(texts)


def _from_pipeline(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if not {"text"} <= item.keys() <= {"text", "text_pair"}:
        raise InputError(f"found a dict with the keys {', '.join(map(repr, item))}, expected 'text' and 'text_pair'")
    return (item["text"], item["text_pair"]) if "text_pair" in item else item["text"]
