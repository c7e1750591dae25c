"""The journey of a text, from top to bottom.

texts -> token ids (once) -> micro-batches by length -> stage 1 -> exit rule -> remaining texts regrouped -> stage 2 ->
... -> predictions in input order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, MemberEntry
from .bundle.manifest import HIDDEN_STATES, PATIENCE, THRESHOLD_RULES, TOKENS
from .engine.batching import bulk_batches, by_length
from .engine.chain import Chain
from .engine.cost import cumulative_layers, whole_model
from .engine.drift import exit_shift
from .engine.exit_rules import ExitRule, checked_thresholds, exit_rule
from .engine.forks import FORKS
from .engine.hidden_states import HiddenStates
from .engine.inputs import check_types, iterated, listed, unwrapped
from .engine.journey import Journey, StageCall
from .engine.opened import Opened
from .engine.probabilities import softmax, softmax_row
from .engine.stage import Stage
from .engine.tokenization import Encoded
from .errors import BundleError, CascadeError, InvalidOption, TextError
from .types import Prediction, StageRun, Stats, Text, Trace

_FIRST = np.zeros(1, dtype=np.intp)


class _LeftOut:
    """The default of `top_k`."""

    def __repr__(self) -> str:
        return "left out"


_BEST: Any = _LeftOut()


class CascadeRuntime:
    """A bundle, ready to classify: each text is answered by the smallest member that is confident enough.

    Immutable, and safe to use from several threads. `with_thresholds`, `with_members` and `with_trace` return another
    runtime that shares the sessions. A context manager: `close` releases the sessions. Pickling stores the bundle's
    path, the settings and the manifest's hash; unpickling opens the bundle again.
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
        spin_us: int | None = None,
        verify: bool = True,
        expected_sha256: str | None = None,
        trace: Callable[[Trace], object] | None = None,
    ) -> None:
        """Read and verify a bundle; each member is loaded when a text first needs it.

        Args:
            model_dir: A folder, or "hf:org/name" or "hf:org/name@revision" on the Hugging Face hub.
            provider: "cpu", "cuda", any provider name of the installed ONNX Runtime, or "openvino".
            threads: Threads for each member's computation; None for all CPUs that this process may use.
            thresholds: None for the bundle's; a float in [0, 1] for one tau at every member; a list for one per member
                but the last.
            members: Names of the members to use; None for those that tuning chose, or for all if nothing was tuned or
                `thresholds` are given.
            preload: Load all members now.
            provider_options: Options for the provider, for instance {"device_id": "1"}; for "openvino", properties
                like {"INFERENCE_PRECISION_HINT": "bf16"}.
            spin_us: Microseconds that threads wait actively for more work before they sleep. None for 500 (segments:
                50), which is fastest alone on its cores; less leaves them sooner to other threads, as in a server.
            verify: Check the sha256 of the files; False is for huge models on a trusted disk.
            expected_sha256: The bundle's, as `cascade-rt info` prints it; another bundle is refused.
            trace: Called after each call of `predict` with what was executed; its exceptions propagate.

        Raises:
            BundleError: The bundle cannot be used.
            InvalidOption: An argument cannot be used.
        """
        check_types(
            model_dir=model_dir,
            members=members,
            preload=preload,
            provider_options=provider_options,
            verify=verify,
            expected_sha256=expected_sha256,
            trace=trace,
        )
        opened = Opened.open(model_dir, members, provider, threads, provider_options, spin_us, verify, expected_sha256)
        bundle = opened.bundle.tuned() if members is None and thresholds is None else opened.bundle
        self._become(opened, bundle, thresholds, trace)
        if preload:
            for stage in self._stages:
                stage.load()

    def _become(
        self,
        opened: Opened,
        bundle: Bundle,
        thresholds: float | Sequence[float] | None,
        trace: Callable[[Trace], object] | None,
    ) -> None:
        """Set the state of a new runtime: what it shares, the members that it uses, and how texts leave."""
        if bundle.exit_rule["kind"] not in THRESHOLD_RULES and thresholds is not None:
            expected = f"none: the exit rule {bundle.exit_rule['kind']} has no thresholds"
            raise InvalidOption("thresholds", thresholds, expected)
        self._opened = opened
        self._bundle = bundle
        self._stages = tuple(opened.stages[member.name] for member in bundle.members)
        self._thresholds = checked_thresholds(thresholds, bundle.thresholds, len(bundle.members))
        self._rule = exit_rule(bundle.exit_rule, self._thresholds, len(bundle.members))
        self._layers: list[int] = cumulative_layers(bundle.members).tolist()
        self._trace = trace
        self._exits = [0] * len(bundle.members)
        self._counting = Lock()

    @property
    def bundle(self) -> Bundle:
        """The manifest, with the members that this runtime uses."""
        return self._bundle

    @property
    def original(self) -> Sequence[MemberEntry]:
        """The members that speed-up ratios compare with: the last model among the members that were opened."""
        return whole_model(self._opened.bundle.members)

    @property
    def thresholds(self) -> list[float]:
        """The threshold of each member but the last; empty under exit rules without thresholds."""
        return list(self._thresholds)

    @property
    def exit_rule(self) -> ExitRule:
        """What decides which texts leave after each member."""
        return self._rule

    @property
    def chain(self) -> Chain:
        """What drives the stages otherwise than `predict` does: the server regroups the texts of many requests."""
        stages = self._open_stages()
        return Chain(self._opened.tokenizer, stages, self._rule, stages[0].budget, self._prediction)

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """Classify texts, or (text, text pair) tuples for a bundle on pairs; answers are in input order.

        Implements the paper's Algorithm 1: a text that has left never reaches a bigger member. Batch composition does
        not matter: in int8 logits are bit-identical, in fp32 probabilities are within 1e-5. Raises InputError for
        anything that is not a text (or pair), and InferenceError if a member fails.
        """
        stages = self._open_stages()
        encoded = self._opened.tokenizer.encode(list(iterated(texts)))
        if len(encoded.lengths) == 1:
            return [self._predict_one(encoded, stages)]
        journey = self._begun(encoded)
        for index, stage in enumerate(stages):
            self._advance(journey, index, stage)
        return self.finish(journey)

    def begin(self, texts: Iterable[Text]) -> Journey:
        """Tokenize texts for `advance`: `predict` in steps, which may run in several processes. Errors as of `predict`.

        Step by step, `predict` is `begin`, `advance` to each member in turn, and `finish`. A journey can be pickled;
        only the tokens of texts that have not left go with it.
        """
        self._open_stages()
        return self._begun(self._opened.tokenizer.encode(list(iterated(texts))))

    def _begun(self, encoded: Encoded) -> Journey:
        texts = len(encoded.lengths)
        return Journey(
            probabilities=np.empty((texts, len(self._bundle.labels))),
            exits=np.empty(texts, dtype=np.intp),
            waiting=by_length(encoded.lengths),
            truncated=[encoded.truncated(row) for row in range(texts)],
            decisions=self._rule.begin(texts),
            inputs={TOKENS: encoded},
            tokenization_seconds=encoded.seconds,
        )

    def advance(self, journey: Journey, member: int, stage: Stage | None = None) -> None:
        """Run a member on the texts of a journey that have not left.

        `member`: its 0-based position. `stage`: what runs it, for instance that of a runtime on another provider; None
        for this runtime's own.
        """
        self._advance(journey, member, stage or self._open_stages()[member])

    def _advance(self, journey: Journey, index: int, stage: Stage) -> None:
        waiting = journey.waiting
        if not waiting.size:
            return
        logits, journey.inputs[HIDDEN_STATES] = self._run(
            index, stage, journey.inputs[stage.reads], waiting, journey.runs
        )
        journey.probabilities[waiting] = answers = softmax(logits)
        leaving = journey.decisions.leaving(index, waiting, answers)
        journey.exits[waiting[leaving]] = index
        journey.waiting = waiting[~leaving]

    def finish(self, journey: Journey) -> list[Prediction]:
        """Return the answers to a journey's texts in input order, after all members; counted in `stats`."""
        exits, winners = journey.exits.tolist(), journey.probabilities.argmax(axis=1).tolist()
        counts = np.bincount(journey.exits, minlength=len(self._bundle.members)).tolist()
        self._record(counts, journey.tokenization_seconds, journey.runs)
        rows = zip(journey.probabilities.tolist(), winners, exits, journey.truncated, strict=True)
        return [self._prediction(*row) for row in rows]

    def _predict_one(self, encoded: Encoded, stages: Sequence[Stage]) -> Prediction:
        """The same journey for one text: there is nothing to order, and all members read the same arrays."""
        inputs: dict[str, dict[str, Any]] = {TOKENS: encoded.batch(_FIRST)}
        decisions = self._rule.begin(1)
        runs: list[StageCall] = []
        for index, stage in enumerate(stages):
            batch = inputs[stage.reads]
            logits, hidden_states, seconds = stage.run(batch)
            runs.append((index, batch["attention_mask"].shape, seconds))
            probabilities = softmax_row(logits[0])
            if decisions.leaves_alone(index, probabilities):
                break
            inputs[HIDDEN_STATES] = {"hidden_states": hidden_states, "attention_mask": batch["attention_mask"]}
        self._record([int(at == index) for at in range(len(stages))], encoded.seconds, runs)
        return self._prediction(probabilities, probabilities.index(max(probabilities)), index, encoded.truncated(0))

    def predict_iter(self, texts: Iterable[Text], chunk_size: int = 1024) -> Iterator[Prediction]:
        """Classify a stream in constant memory, `chunk_size` texts at a time; answers are in input order."""
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral) or chunk_size < 1:
            raise InvalidOption("chunk_size", chunk_size, "a whole number from 1")
        self._open_stages()
        return self._stream(iterated(texts), chunk_size)

    def _stream(self, texts: Iterator[Text], chunk_size: int) -> Iterator[Prediction]:
        done = 0
        while chunk := list(islice(texts, chunk_size)):
            try:
                yield from self.predict(chunk)
            except TextError as error:
                raise TextError(done + error.index, error.reason) from error
            done += len(chunk)

    def __call__(self, inputs: Any, *, top_k: int | None = _BEST, batch_size: int | None = None) -> Any:
        """Answer as a transformers text-classification pipeline does.

        Args:
            inputs: One text, one pair, or one {"text": ..., "text_pair": ...}; or a list of them, a pandas Series or a
                one-dimensional numpy array of str.
            top_k: Left out: the most probable label of each text as {"label": ..., "score": ...}. A number: a list of
                that many, by descending score. None: a list of all labels.
            batch_size: Accepted because pipelines take it; it has no effect, since micro-batches are formed by tokens.

        Returns:
            The answer of one text, or a list of answers.
        """
        for field, value in (("top_k", None if top_k is _BEST else top_k), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise InvalidOption(field, value, "a whole number from 1, or None")
        many = listed(inputs)
        texts = [inputs] if many is None else many
        answers = [self._ranked(prediction, top_k) for prediction in self.predict(unwrapped(item) for item in texts)]
        return answers[0] if many is None else answers

    def member_logits(self, texts: Iterable[Text]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Run every member on every text, whatever the exit rule: the input of evaluation and tuning.

        Returns the logits, float32 of shape (members, texts, labels), and each text's length in tokens, (texts,).
        """
        stages = self._open_stages()
        encoded = self._opened.tokenizer.encode(list(iterated(texts)))
        rows = by_length(encoded.lengths)
        logits = np.empty((len(stages), len(rows), len(self._bundle.labels)), dtype=np.float32)
        inputs: dict[str, Encoded | HiddenStates] = {TOKENS: encoded}
        for index, stage in enumerate(stages):
            answers, inputs[HIDDEN_STATES] = self._run(index, stage, inputs[stage.reads], rows, [])
            logits[index, rows] = answers
        return logits, encoded.lengths

    def stats(self, *, reset: bool = False) -> Stats:
        """Return what this runtime has answered so far, and whether the texts are still of the kind of tuning.

        `reset` starts a new count, for instance every hour.
        """
        with FORKS, self._counting:
            seen = list(self._exits)
            if reset:
                self._exits = [0] * len(seen)
        texts = sum(seen)
        executed = sum(count * layers for count, layers in zip(seen, self._layers, strict=True))
        mean_layers = executed / texts if texts else float("nan")
        tuning = self._bundle.tuning
        names = [entry.name for entry in self._bundle.members]
        if tuning is None or tuning.thresholds != self._thresholds or tuning.members != names:
            return Stats(texts, seen, mean_layers, None, None, None)
        rates = [count / sum(tuning.exits) for count in tuning.exits]
        distance, p_value = exit_shift(tuning.exits, seen) if texts else (None, None)
        return Stats(texts, seen, mean_layers, rates, distance, p_value)

    def count(self, exits: Sequence[int]) -> None:
        """Count texts that were answered otherwise than by `predict`, one number for each member, for `stats`."""
        with FORKS, self._counting:
            self._exits = [one + other for one, other in zip(self._exits, exits, strict=True)]

    def with_thresholds(self, thresholds: float | Sequence[float] | None) -> CascadeRuntime:
        """Return a runtime with other thresholds and the same members, which shares the sessions.

        `thresholds`: a float, a list, or None for the bundle's. The counts of `stats` start from zero.
        """
        return self._with(self._bundle, thresholds, self._trace)

    def with_patience(self, patience: int) -> CascadeRuntime:
        """Return a runtime with another patience, which shares the sessions; for bundles with that exit rule.

        `patience`: how many members in a row must agree with the one before them. The counts of `stats` start from
        zero.
        """
        rule = self._bundle.exit_rule
        if rule["kind"] != PATIENCE:
            raise InvalidOption("patience", patience, f"none: the exit rule {rule['kind']} has thresholds")
        if isinstance(patience, bool) or not isinstance(patience, Integral) or patience < 1:
            raise InvalidOption("patience", patience, "a whole number from 1")
        return self._with(replace(self._bundle, exit_rule={**rule, "patience": int(patience)}), None, self._trace)

    def without_exits(self) -> CascadeRuntime:
        """Return a runtime in which no text leaves before the last member, which shares the sessions."""
        if self._bundle.exit_rule["kind"] == PATIENCE:
            return self.with_patience(len(self._stages))
        return self.with_thresholds(1.0)

    def with_members(self, members: Sequence[str] | None) -> CascadeRuntime:
        """Return a runtime with other members, by name, which shares the sessions; None for all that were opened.

        Members that this runtime uses keep their thresholds; the others take the bundle's. The counts of `stats` start
        from zero.
        """
        whole = self._opened.bundle
        bundle = whole if members is None else whole.only(members)
        ours = dict(zip((entry.name for entry in self._bundle.members), self._thresholds, strict=False))
        kept = [ours.get(entry.name, entry.threshold) for entry in bundle.members[:-1]]
        thresholds = [threshold for threshold in kept if threshold is not None]
        return self._with(bundle, thresholds or None, self._trace)

    def with_trace(self, trace: Callable[[Trace], object] | None) -> CascadeRuntime:
        """Return a runtime that shares the sessions and calls `trace` after each call of `predict`.

        The counts of `stats` start from zero.
        """
        return self._with(self._bundle, self._thresholds or None, trace)

    def close(self) -> None:
        """Release the sessions; those that another runtime shares stay until that one is closed too."""
        self._stages = ()
        self._opened = self._opened.without_stages()

    def __enter__(self) -> CascadeRuntime:
        """Return the runtime itself; `close` is called at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the runtime."""
        self.close()

    def __repr__(self) -> str:
        """Show what was opened and how it runs."""
        members = ", ".join(f"{entry.name} ({entry.layers}L {entry.precision})" for entry in self._bundle.members)
        rule = f"thresholds={self._thresholds}" if self._thresholds else f"exit_rule={self._bundle.exit_rule['kind']!r}"
        closed = "" if self._stages else ", closed"
        return (
            f"CascadeRuntime({str(self._opened.model_dir)!r}, members=[{members}], {rule}, "
            f"provider={self._opened.provider!r}, threads={self._opened.threads}{closed})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path, settings and the manifest's hash; a trace hook and the counts of `stats` are left out."""
        self._open_stages()
        opened = self._opened
        settings = {
            "provider": opened.provider,
            "threads": opened.threads,
            "members": [entry.name for entry in opened.bundle.members],
            "provider_options": opened.provider_options,
            "spin_us": opened.spin_us,
            "verify": opened.verify,
        }
        members = [entry.name for entry in self._bundle.members]
        state = (str(opened.model_dir), opened.bundle.sha256, settings, members, self._thresholds or None)
        return _reopened, (type(self), *state, self._bundle.exit_rule.get("patience"))

    def _with(
        self,
        bundle: Bundle,
        thresholds: float | Sequence[float] | None,
        trace: Callable[[Trace], object] | None,
    ) -> CascadeRuntime:
        self._open_stages()
        other = object.__new__(type(self))
        other._become(self._opened, bundle, thresholds, trace)
        return other

    def _open_stages(self) -> tuple[Stage, ...]:
        """Return the stages, which another thread's `close` then does not take away; raise CascadeError if closed."""
        stages = self._stages
        if not stages:
            raise CascadeError("this runtime is closed; open the bundle again")
        return stages

    def _run(
        self,
        index: int,
        stage: Stage,
        inputs: Encoded | HiddenStates,
        rows: NDArray[np.intp],
        runs: list[StageCall],
    ) -> tuple[NDArray[np.float32], HiddenStates]:
        """Run one stage on `rows`, in micro-batches: logits in the order of `rows`, and the hidden states it left."""
        logits = np.empty((len(rows), len(self._bundle.labels)), dtype=np.float32)
        left = HiddenStates(inputs.lengths)
        done = 0
        groups, share_threads = bulk_batches(rows, inputs.lengths, stage.budget, stage.at_once)
        outputs = stage.run_each(groups, inputs.batch, share_threads=share_threads)
        for some, (batch, (answers, hidden_states, seconds)) in zip(groups, outputs, strict=True):
            logits[done : done + len(some)] = answers
            left.put(some, batch["attention_mask"], hidden_states)
            runs.append((index, batch["attention_mask"].shape, seconds))
            done += len(some)
        return logits, left

    def _record(self, exits: list[int], tokenization_seconds: float, runs: list[StageCall]) -> None:
        self.count(exits)
        if self._trace is not None:
            names = [entry.name for entry in self._bundle.members]
            stage_runs = [
                StageRun(index, names[index], rows, tokens, seconds) for index, (rows, tokens), seconds in runs
            ]
            self._trace(Trace(sum(exits), tokenization_seconds, stage_runs))

    def _prediction(self, probabilities: list[float], winner: int, exit: int, truncated: bool) -> Prediction:
        label, score = self._bundle.labels[winner], probabilities[winner]
        return Prediction(label, score, tuple(probabilities), exit, self._layers[exit], truncated)

    def _ranked(self, prediction: Prediction, top_k: int | None) -> Any:
        if top_k is _BEST:
            return {"label": prediction.label, "score": prediction.score}
        ranked = sorted(zip(self._bundle.labels, prediction.probabilities, strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in ranked[:top_k]]


def _reopened(
    kind: type[CascadeRuntime],
    model_dir: str,
    sha256: str | None,
    settings: Mapping[str, Any],
    members: Sequence[str],
    thresholds: Sequence[float] | None,
    patience: int | None,
) -> CascadeRuntime:
    """Open a pickled runtime's bundle again; raise BundleError if another one is there now."""
    runtime = kind(model_dir, **settings)
    if runtime.bundle.sha256 != sha256:
        raise BundleError(f"{model_dir}: replaced since the runtime was pickled; open the bundle again")
    runtime = runtime.with_members(members)
    return runtime.with_thresholds(thresholds) if patience is None else runtime.with_patience(patience)
