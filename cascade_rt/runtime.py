"""The whole journey of a text, top to bottom.

texts -> token ids (once) -> micro-batches by length -> member 1 -> gate -> survivors regrouped -> member 2 ->
... -> predictions in input order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .batching import DEVICE_TOKEN_BUDGET, TOKEN_BUDGET, by_length, micro_batches
from .bundle import MANIFEST, Bundle, file_version, read_bundle
from .cost import cumulative_layers
from .cpus import usable_threads
from .drift import Stats, exit_shift
from .errors import BundleError, InputError, TextError
from .gate import checked_thresholds, confidence, leaves, softmax, softmax_row
from .member import Member, provider_name
from .records import Text
from .tokenization import Encoded, TextTokenizer

_EVERYONE = float("-inf")  # the last member's gate
_FIRST = np.zeros(1, dtype=np.intp)


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
        members: Sequence[str] | None = None,
        preload: bool = False,
        provider_options: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> None:
        """Read and verify the bundle in `model_dir`; each member is loaded when a text first needs it.

        `model_dir`: a folder, or "org/name" or "org/name@revision" on the Hugging Face hub. `provider`: "cpu", "cuda",
        or any provider name of the installed ONNX Runtime; `provider_options` are handed to it, for instance
        {"device_id": "1"}. `threads`: for each member's computation, None for all CPUs that this process may use.
        `thresholds`: None for the bundle's, a float for one tau at every member, or a list, one per member but the
        last; each in [0, 1]. `members`: the names of those to use, None for those that tuning chose (all, where
        nothing was tuned or `thresholds` are given). `preload` loads them all now. `verify=False` leaves out the
        sha256 of the files, for huge models on a disk that is trusted.
        Raises BundleError for a bundle that cannot be used and InputError for an argument that cannot.
        """
        bundle = read_bundle(model_dir, members, verify=verify)
        self.original = bundle.members[-1]
        self.bundle: Bundle = bundle.tuned() if members is None and thresholds is None else bundle
        folder, entries = self.bundle.folder or Path(model_dir), self.bundle.members
        self.thresholds: list[float] = checked_thresholds(thresholds, self.bundle.thresholds, len(entries))
        self._tokenizer = TextTokenizer(folder / self.bundle.tokenizer_file, self.bundle.max_length, self.bundle.pair)
        count, wanted = usable_threads(threads), provider_name(provider)
        self._members = [
            Member(entry, folder / entry.file, len(self.bundle.labels), wanted, count, provider_options)
            for entry in entries
        ]
        if file_version(folder / MANIFEST) != self.bundle.version:  # what was read is no longer what members load
            raise BundleError(f"{folder}: replaced while it was opened; open it again")
        self._budget = TOKEN_BUDGET if wanted == "CPUExecutionProvider" else DEVICE_TOKEN_BUDGET
        self._layers: list[int] = cumulative_layers(entries).tolist()
        self._exits = [0] * len(entries)
        self._counting = Lock()
        if preload:
            for member in self._members:
                member.load()

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """Classify texts, or (text, text pair) tuples for a bundle on pairs; answers in input order.

        Implements the paper's Algorithm 1: a text that left never reaches a bigger member. Raises InputError for
        anything that is not a text (or pair).
        """
        texts = list(_iterated(texts))
        encoded = self._tokenizer.encode(texts)
        if len(texts) == 1:
            return [self._predict_one(encoded)]
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
        self._count(np.bincount(exits, minlength=len(self._members)).tolist())
        winners = probabilities.argmax(axis=1).tolist()
        return [
            self._prediction(row, winner, exit, encoded.truncated(index))
            for index, (row, winner, exit) in enumerate(
                zip(probabilities.tolist(), winners, exits.tolist(), strict=True)
            )
        ]

    def _predict_one(self, encoded: Encoded) -> Prediction:
        """The same journey for one text: nothing to order, and all members read the same arrays."""
        batch = encoded.batch(_FIRST)
        for index, member in enumerate(self._members):
            probabilities = softmax_row(member.run(batch)[0].tolist())
            score = max(probabilities)
            if index == len(self.thresholds) or score > self.thresholds[index]:
                break
        with self._counting:
            self._exits[index] += 1
        return self._prediction(probabilities, probabilities.index(score), index, encoded.truncated(0))

    def predict_iter(self, texts: Iterable[Text], chunk_size: int = 1024) -> Iterator[Prediction]:
        """Classify a stream in constant memory; answers in input order, a chunk of `chunk_size` texts at a time."""
        if chunk_size < 1:
            raise InputError(f"found a chunk size of {chunk_size}, expected at least 1")
        return self._stream(_iterated(texts), chunk_size)

    def _stream(self, texts: Iterator[Text], chunk_size: int) -> Iterator[Prediction]:
        done = 0
        while chunk := list(islice(texts, chunk_size)):
            try:
                yield from self.predict(chunk)
            except TextError as error:
                raise TextError(done + error.index, error.reason) from None
            done += len(chunk)

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
        encoded = self._tokenizer.encode(list(_iterated(texts)))
        rows = by_length(encoded.lengths)
        logits = np.empty((len(self._members), len(rows), len(self.bundle.labels)), dtype=np.float32)
        for index, member in enumerate(self._members):
            logits[index, rows] = self._logits(member, encoded, rows)
        return logits, encoded.lengths

    def stats(self, *, reset: bool = False) -> Stats:
        """Tell what was answered since the runtime was made, and whether the texts are still of tuning's kind.

        `reset` starts to count anew, to watch one hour or one day at a time.
        """
        with self._counting:
            seen = self._exits
            if reset:
                self._exits = [0] * len(seen)
            else:
                seen = list(seen)
        texts = sum(seen)
        executed = sum(count * layers for count, layers in zip(seen, self._layers, strict=True))
        mean_layers = executed / texts if texts else float("nan")
        tuning = self.bundle.tuning
        names = [entry.name for entry in self.bundle.members]
        if tuning is None or tuning.thresholds != self.thresholds or tuning.members != names:
            return Stats(texts, seen, mean_layers, None, None, None)
        rates = [count / sum(tuning.exits) for count in tuning.exits]
        distance, p_value = exit_shift(tuning.exits, seen) if texts else (None, None)
        return Stats(texts, seen, mean_layers, rates, distance, p_value)

    def member_seconds(self, text: Text) -> tuple[float, list[float]]:
        """Time one text, alone as `predict` would run it: its tokenization, and each member, in seconds."""
        started = perf_counter()
        batch = self._tokenizer.encode([text]).batch(_FIRST)
        tokenized = perf_counter() - started
        seconds = []
        for member in self._members:
            started = perf_counter()
            member.run(batch)
            seconds.append(perf_counter() - started)
        return tokenized, seconds

    def _count(self, exits: list[int]) -> None:
        with self._counting:
            self._exits = [one + other for one, other in zip(self._exits, exits, strict=True)]

    def _logits(self, member: Member, encoded: Encoded, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Run one member on `rows`, in micro-batches; logits in the order of `rows`."""
        logits = np.empty((len(rows), len(self.bundle.labels)), dtype=np.float32)
        done = 0
        for batch in micro_batches(rows, encoded.lengths, self._budget):
            logits[done : done + len(batch)] = member.run(encoded.batch(batch))
            done += len(batch)
        return logits

    def _prediction(self, probabilities: list[float], winner: int, exit: int, truncated: bool) -> Prediction:
        label, score = self.bundle.labels[winner], probabilities[winner]
        return Prediction(label, score, tuple(probabilities), exit, self._layers[exit], truncated)


def _iterated(texts: Iterable[Text]) -> Iterator[Text]:
    if isinstance(texts, str | bytes | Mapping):
        raise InputError(f"found one {type(texts).__name__}, expected a list of texts; wrap it: [text]")
    return iter(texts)


def _from_pipeline(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if not {"text"} <= item.keys() <= {"text", "text_pair"}:
        raise InputError(f"found a dict with the keys {', '.join(map(repr, item))}, expected 'text' and 'text_pair'")
    return (item["text"], item["text_pair"]) if "text_pair" in item else item["text"]
