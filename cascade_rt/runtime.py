"""The journey of a text, from top to bottom.

texts -> token ids (once) -> micro-batches by length -> stage 1 -> exit rule -> remaining texts regrouped -> stage 2 ->
... -> predictions in input order. A text may be several rows of micro-batches, its windows; they leave together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from numbers import Integral
from pathlib import Path
from struct import Struct
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, MemberEntry
from .bundle.manifest import HIDDEN_STATES, TOKENS
from .engine.batching import by_length
from .engine.cost import whole_model
from .engine.drift import exit_shift
from .engine.execution import Execution
from .engine.exit_rules import ExitRule, exit_rule
from .engine.forks import FORKS
from .engine.hidden_states import HiddenStates
from .engine.inputs import check_types, iterated, listed, unwrapped
from .engine.plan import OpenBundle, Plan
from .engine.providers import on_exact_kernels
from .engine.stage import Stage
from .engine.step import FIRST, Journey, run_texts, shape, step_alone
from .engine.task import Task
from .engine.tokenization import Encoded
from .engine.windows import Windows
from .errors import BundleError, CascadeError, InputError, InvalidOption, TextError
from .types import Prediction, StageRun, Stats, Text, Trace


class _LeftOut:
    """The default of `top_k`."""

    def __repr__(self) -> str:
        return "left out"


_BEST: Any = _LeftOut()


class CascadeRuntime:
    """A bundle, ready to classify: each text is answered by the smallest member that is confident enough.

    Immutable, and safe to use from several threads. `with_thresholds`, `with_members` and others return another runtime
    that shares the sessions. A context manager: `close` releases the sessions. Pickling stores the bundle's
    path, the settings and the manifest's hash; unpickling opens the bundle again.
    """

    def __init__(
        self,
        model_dir: str | Path | Plan,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        thresholds: float | Sequence[float] | None = None,
        members: Sequence[str] | None = None,
        preload: bool = False,
        provider_options: Mapping[str, str] | None = None,
        spin_us: int | None = None,
        cache: str | Path | None = None,
        low_memory: bool = False,
        word_cache: bool = True,
        packed: bool = True,
        verify: bool = True,
        expected_sha256: str | None = None,
        trace: Callable[[Trace], object] | None = None,
        stride: int | None = None,
        aggregate: str | None = None,
    ) -> None:
        """Read and verify a bundle; each member is loaded when a text first needs it.

        Args:
            model_dir: A folder, or "hf:org/name" or "hf:org/name@revision" on the Hugging Face hub. Or the `plan` of
                another runtime, perhaps changed, whose sessions are shared; then it is the only argument.
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
            cache: A folder where members are kept as ONNX Runtime prepares them for this CPU, which makes the next
                start faster and memory smaller; "off" for none. None for the environment variable CASCADE_RT_CACHE,
                else the user's cache folder.
            low_memory: Run one micro-batch at a time with all threads, on one session, and return memory after each;
                many texts take longer.
            word_cache: Put texts together from the token ids of words that were tokenized before, where that gives the
                tokenizer's ids exactly; up to 24 MB of words are kept.
            packed: Pack the weights for the CPU's kernels when a member is loaded. False is for a process that answers
                a few texts: fp32 and fp16 start sooner and hold less memory, and a text takes more than twice as long.
            verify: Check the sha256 of the files, those of a member when it is first loaded; False is for huge models
                on a trusted disk, and keeps nothing in `cache`.
            expected_sha256: The bundle's, as `cascade-rt info` prints it; another bundle is refused.
            trace: Called after each call of `predict` with what was executed; its exceptions propagate.
            stride: None to cut texts of too many tokens; a number to read them in windows, of which each shares so many
                tokens with the one before it, as in the tokenizers library.
            aggregate: With a stride, what becomes of the probabilities of the windows: "mean", the default, or "max".

        Raises:
            BundleError: The bundle cannot be used.
            InvalidOption: An argument cannot be used.
        """
        self._counting = Lock()
        if isinstance(model_dir, Plan):
            others = (threads, thresholds, members, provider_options, spin_us, cache, expected_sha256, trace, stride)
            flags = low_memory or not (word_cache and packed)
            if flags or any(other is not None for other in (*others, aggregate)):
                raise InputError(
                    "found a plan and other arguments, expected the plan alone; change it by dataclasses.replace"
                )
            self._plan = model_dir
        else:
            check_types(
                model_dir=model_dir,
                members=members,
                preload=preload,
                provider_options=provider_options,
                cache=cache,
                low_memory=low_memory,
                word_cache=word_cache,
                packed=packed,
                verify=verify,
                expected_sha256=expected_sha256,
                trace=trace,
            )
            windows = Windows.of(stride, aggregate)
            execution = Execution(provider, threads, provider_options, spin_us, cache, low_memory, word_cache, packed)
            opened = OpenBundle.open(
                model_dir, execution, members=members, verify=verify, expected_sha256=expected_sha256
            )
            bundle = opened.bundle.tuned() if members is None and thresholds is None else opened.bundle
            rule = exit_rule(bundle)
            if thresholds is not None:
                rule = _changed(rule, "thresholds", thresholds, len(bundle.members))
            self._plan = Plan(opened, bundle, rule, trace, windows)
            if preload:
                for stage in self._plan.stages:
                    stage.load()
        self._exits, self._layers, self._from_words = [0] * len(self._plan.bundle.members), 0, 0

    @property
    def plan(self) -> Plan:
        """The members, their stages, the tokenizer and the exit rule, for programs that run them without `predict`.

        Raises CascadeError if the runtime is closed.
        """
        plan = self._plan  # another thread's `close` does not take its stages away
        if not plan.stages:
            raise CascadeError("this runtime is closed; open the bundle again")
        return plan

    @property
    def bundle(self) -> Bundle:
        """The manifest, with the members that this runtime uses."""
        return self._plan.bundle

    @property
    def task(self) -> Task:
        """The meaning of logits."""
        return self._plan.task

    @property
    def original(self) -> Sequence[MemberEntry]:
        """The members that speed-up ratios compare with: the last model among the members that were opened."""
        return whole_model(self._plan.opened.bundle.members)

    @property
    def thresholds(self) -> list[float]:
        """The threshold of each member but the last; empty under exit rules without thresholds."""
        return list(self._plan.rule.thresholds)

    @property
    def exit_rule(self) -> ExitRule:
        """The rule that decides which texts leave after each member."""
        return self._plan.rule

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """Classify texts, or (text, text pair) tuples for a bundle on pairs; answers are in input order.

        Implements the paper's Algorithm 1: a text that has left never reaches a bigger member. Batch composition does
        not matter: in int8 logits are bit-identical on x86, else probabilities are within 1e-5. Raises InputError for
        anything that is not a text (or pair), and InferenceError if a member fails.
        """
        plan = self.plan
        encoded = plan.encode(list(iterated(texts)))
        if len(encoded) == 1 and encoded.counts is None:
            return [self._predict_one(plan, encoded)]
        journey = _begun(plan, encoded)
        for index in range(len(plan.stages)):
            journey.advance(plan, index)
        return self.finish(journey)

    def begin(self, texts: Iterable[Text]) -> Journey:
        """Tokenize texts for `advance`: `predict` in steps, which may run in several processes. Errors as of `predict`.

        Step by step, `predict` is `begin`, `advance` to each member in turn, and `finish`. A journey can be pickled;
        only the tokens of texts that have not left go with it.
        """
        plan = self.plan
        return _begun(plan, plan.encode(list(iterated(texts))))

    def advance(self, journey: Journey, member: int, stage: Stage | None = None) -> None:
        """Run a member on the texts of a journey that have not left.

        `member`: its 0-based position. `stage`: what runs it, for instance that of a runtime on another provider; None
        for this runtime's own.
        """
        journey.advance(self.plan, member, stage)

    def finish(self, journey: Journey) -> list[Prediction]:
        """Return the answers to a journey's texts in input order, after all members; counted in `stats`."""
        plan = self._plan
        counts = np.bincount(journey.exits, minlength=len(plan.bundle.members)).tolist()
        many, executed = journey.rows, None
        if many is not None:
            executed = int(many @ np.array(plan.layers)[journey.exits])
        self.count(counts, executed, from_words=journey.from_words)
        self._traced(len(journey.exits), journey.tokenization_seconds, journey.runs)
        probabilities = journey.probabilities
        rows = Struct(f"{probabilities.shape[1]}d").iter_unpack(probabilities.data)  # half the time of `tolist`
        winners, exits = probabilities.argmax(axis=1).tolist(), journey.exits.tolist()
        each = repeat(1) if many is None else many.tolist()
        return list(map(plan.prediction, rows, winners, exits, journey.truncated, each))

    def _predict_one(self, plan: Plan, encoded: Encoded) -> Prediction:
        """The same journey for one text of one row: there is nothing to order or to regroup."""
        state = plan.rule.begin(1)
        runs: list[StageRun] = []
        following: Any = None  # what a segment reads
        for index, stage in enumerate(plan.stages):
            batch = stage.batch(encoded, FIRST) if stage.reads == TOKENS else following
            output, probabilities, winner, leaves = step_alone(plan, index, batch, plan.rule, state)
            if plan.trace is not None:
                runs.append(StageRun(index, stage.entry.name, *shape(batch), output.seconds))
            if leaves:
                break
            following = {"hidden_states": output.hidden_states, "attention_mask": batch["attention_mask"]}
        self.count_text(index, plan.layers[index], from_words=encoded.from_words)
        self._traced(1, encoded.seconds, runs)
        return plan.prediction(probabilities, winner, index, encoded.truncated(0))

    def predict_iter(self, texts: Iterable[Text], chunk_size: int = 1024) -> Iterator[Prediction]:
        """Classify a stream in constant memory, `chunk_size` texts at a time; answers are in input order."""
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral) or chunk_size < 1:
            raise InvalidOption("chunk_size", chunk_size, "a whole number from 1")
        self.plan  # noqa: B018 - fails now, not at the first text
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

        Returns the logits, float32 of shape (members, texts, labels), and each text's length in tokens, (texts,). With
        a stride, a text's logits are those of its windows together (see `Task.aggregated`), and its length is that of
        all its windows: each has the bundle's `max_length` tokens, and the last one has the rest.
        """
        plan = self.plan
        encoded = plan.encode(list(iterated(texts)))
        order = by_length(encoded.tokens)
        logits = np.empty((len(plan.stages), len(order), len(plan.bundle.labels)), dtype=np.float32)
        inputs: dict[str, Encoded | HiddenStates] = {TOKENS: encoded}
        for index, stage in enumerate(plan.stages):
            read = inputs[stage.reads]
            logits[index, order], inputs[HIDDEN_STATES], _ = run_texts(plan, index, stage, read, order, stage.at_once)
        return logits, encoded.tokens

    def stats(self, *, reset: bool = False) -> Stats:
        """Return what this runtime has answered so far, and whether the texts are still of the kind of tuning.

        `reset` starts a new count, for instance every hour.
        """
        with FORKS, self._counting:
            seen, executed, from_words = list(self._exits), self._layers, self._from_words
            if reset:
                self._exits, self._layers, self._from_words = [0] * len(seen), 0, 0
        texts = sum(seen)
        mean_layers = executed / texts if texts else float("nan")
        exact = on_exact_kernels(self.bundle, self._plan.opened.execution.provider)
        tuning = self.bundle.tuning
        names = [entry.name for entry in self.bundle.members]
        as_tuned = tuning is not None and tuning.members == names and tuning.windows == self._windows
        if tuning is None or not as_tuned or self.exit_rule != exit_rule(self.bundle):
            return Stats(texts, seen, mean_layers, None, None, None, exact, from_words)
        rates = [count / sum(tuning.exits) for count in tuning.exits]
        distance, p_value = exit_shift(tuning.exits, seen) if texts else (None, None)
        return Stats(texts, seen, mean_layers, rates, distance, p_value, exact, from_words)

    @property
    def _windows(self) -> dict[str, Any]:
        """The settings of windows, as a tuning records them; none where texts are cut."""
        return {} if self._plan.windows is None else asdict(self._plan.windows)

    def count(self, exits: Sequence[int], layers: int | None = None, *, from_words: int = 0) -> None:
        """Count texts that were answered without `predict`, one number for each member, for `stats`.

        `layers`: executed for them in all; None for texts of one row. `from_words`: see `Stats`.
        """
        if layers is None:
            layers = sum(texts * each for texts, each in zip(exits, self._plan.layers, strict=True))
        with FORKS, self._counting:
            self._layers += layers
            self._from_words += from_words
            for index, texts in enumerate(exits):
                self._exits[index] += texts

    def count_text(self, exit: int, layers: int, *, from_words: int = 0) -> None:
        """Count one text, as `count`; `exit`: the member that answered."""
        with FORKS, self._counting:
            self._exits[exit] += 1
            self._layers += layers
            self._from_words += from_words

    def with_exit_rule(self, rule: ExitRule) -> CascadeRuntime:
        """Return a runtime with another exit rule, of any kind, which shares the sessions.

        Raises InvalidOption for a rule with thresholds for another number of members. The counts of `stats` start from
        zero, as for all runtimes that are returned here.
        """
        if not isinstance(rule, ExitRule):
            raise InvalidOption("rule", rule, "an exit rule, for instance Patience(3)")
        if rule.parameter == "thresholds":
            rule = rule.changed(rule.thresholds, len(self.bundle.members))
        return self._with(rule=rule)

    def with_thresholds(self, thresholds: float | Sequence[float] | None) -> CascadeRuntime:
        """Return a runtime with other thresholds and the same members: a float, a list, or None for the bundle's."""
        if thresholds is None:
            return self._with(rule=exit_rule(self.bundle))
        return self.changed("thresholds", thresholds)

    def with_patience(self, patience: int) -> CascadeRuntime:
        """Return a runtime with another patience: so many members in a row must agree with the one before them."""
        return self.changed("patience", patience)

    def without_exits(self) -> CascadeRuntime:
        """Return a runtime in which no text leaves before the last member, which shares the sessions."""
        return self._with(rule=self.exit_rule.without_exits(len(self.bundle.members)))

    def with_members(self, members: Sequence[str] | None) -> CascadeRuntime:
        """Return a runtime with other members, by name, which shares the sessions; None for all that were opened.

        Members that this runtime uses keep their thresholds; the others take the bundle's.
        """
        return type(self)(self.plan.only(members))

    def with_trace(self, trace: Callable[[Trace], object] | None) -> CascadeRuntime:
        """Return a runtime that shares the sessions and calls `trace` after each call of `predict`."""
        return self._with(trace=trace)

    def with_stride(self, stride: int | None, aggregate: str | None = None) -> CascadeRuntime:
        """Return a runtime that reads long texts in windows, and shares the sessions; None cuts them.

        Arguments as of the constructor. Raises InvalidOption for a stride that is as long as a window.
        """
        return self._with(windows=Windows.of(stride, aggregate))

    def changed(self, parameter: str, value: Any) -> CascadeRuntime:
        """Return a runtime with another value of its exit rule's parameter: the general `with_patience`.

        Raises InvalidOption if the rule has another parameter, or for a value that cannot be used.
        """
        return self._with(rule=_changed(self.exit_rule, parameter, value, len(self.bundle.members)))

    def _with(self, **changes: Any) -> CascadeRuntime:
        return type(self)(replace(self.plan, **changes))

    def close(self) -> None:
        """Release the sessions; those that another runtime shares stay until that one is closed too."""
        self._plan = replace(self._plan, opened=replace(self._plan.opened, stages={}))

    def __enter__(self) -> CascadeRuntime:
        """Return the runtime itself; `close` is called at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the runtime."""
        self.close()

    def __repr__(self) -> str:
        """Show the bundle, its members, the exit rule and where they run."""
        plan = self._plan
        members = ", ".join(f"{entry.name} ({entry.layers}L {entry.precision})" for entry in plan.bundle.members)
        rule = f"thresholds={self.thresholds}" if self.thresholds else f"exit_rule={plan.rule.kind!r}"
        rule += "".join(f", {name}={value!r}" for name, value in self._windows.items())
        closed = "" if plan.stages else ", closed"
        execution = plan.opened.execution
        return (
            f"CascadeRuntime({str(plan.opened.model_dir)!r}, members=[{members}], {rule}, "
            f"provider={execution.provider!r}, threads={execution.threads}{closed})"
        )

    def recipe(self) -> Recipe:
        """Return how to open the same runtime again; a trace hook and the counts of `stats` are left out."""
        plan = self.plan
        opened = plan.opened
        return Recipe(
            model_dir=str(opened.model_dir),
            sha256=plan.bundle.sha256 or "",
            opened=tuple(entry.name for entry in opened.bundle.members),
            members=tuple(entry.name for entry in plan.bundle.members),
            rule=plan.rule,
            execution=opened.execution,
            verify=opened.verify,
            windows=plan.windows,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the recipe."""
        return Recipe.open, (self.recipe(), type(self))

    def _traced(self, texts: int, tokenization_seconds: float, runs: list[StageRun]) -> None:
        if self._plan.trace is not None:
            self._plan.trace(Trace(texts, tokenization_seconds, runs))

    def _ranked(self, prediction: Prediction, top_k: int | None) -> Any:
        if top_k is _BEST:
            return {"label": prediction.label, "score": prediction.score}
        ranked = sorted(zip(self.bundle.labels, prediction.probabilities, strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in ranked[:top_k]]


@dataclass(frozen=True)
class Recipe:
    """The way to open the same runtime again, perhaps in another process or on another machine."""

    model_dir: str
    sha256: str
    """Hash of the manifest."""
    opened: tuple[str, ...]
    """Names of all members that were opened."""
    members: tuple[str, ...]
    """Names of the members that answer."""
    rule: ExitRule
    execution: Execution
    verify: bool
    windows: Windows | None = None

    def open(self, kind: type[CascadeRuntime] = CascadeRuntime) -> CascadeRuntime:
        """Open the runtime; raise BundleError if another bundle is there now."""
        whole = kind(self.model_dir, **self.execution.arguments(), members=self.opened, verify=self.verify)
        if whole.bundle.sha256 != self.sha256:
            raise BundleError(f"{self.model_dir}: replaced since the runtime was pickled; open the bundle again")
        cutting = whole.with_members(self.members).with_exit_rule(self.rule)
        return kind(replace(cutting.plan, windows=self.windows))


def _changed(rule: ExitRule, parameter: str, value: Any, members: int) -> ExitRule:
    """Return a rule with another value of its parameter; raise InvalidOption if it has another one."""
    if rule.parameter != parameter:
        raise InvalidOption(parameter, value, f"none: the exit rule {rule.kind} has no {parameter}")
    return rule.changed(value, members)


def _begun(plan: Plan, encoded: Encoded) -> Journey:
    texts = len(encoded)
    return Journey(
        probabilities=np.empty((texts, len(plan.bundle.labels))),
        exits=np.empty(texts, dtype=np.intp),
        waiting=by_length(encoded.tokens),
        truncated=[encoded.truncated(row) for row in range(texts)],
        state=plan.rule.begin(texts),
        inputs={TOKENS: encoded},
        tokenization_seconds=encoded.seconds,
        from_words=encoded.from_words,
    )
