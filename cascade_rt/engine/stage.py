"""A stage: a member as sessions of an engine, with an explicit number of threads.

It starts from token ids (a member of a cascade) or from the hidden states that the stage before it left (a segment of a
multi-exit model).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..bundle.files import FileIdentity, file_identity
from ..bundle.manifest import HIDDEN_STATES, TOKENS, TYPICAL_TOKENS
from ..errors import BundleError, InferenceError, first_line
from .backends import Check, backend_for, out_of_memory
from .batching import token_budget, worth_a_thread
from .execution import Execution
from .forks import FORKS, never_destroy
from .hidden_states import HiddenStates
from .openvino import Feed
from .providers import check_precision
from .tokenization import INPUTS, Encoded

_SPIN_MICROSECONDS, _SEGMENT_SPIN_MICROSECONDS = 500, 50
_INPUTS = {TOKENS: INPUTS, HIDDEN_STATES: ("hidden_states", "attention_mask")}  # the first is required
_HIDDEN_OUTPUT = "last_hidden_state"
Batch = Feed
"""A padded micro-batch: arrays of shape (rows, tokens, ...) by input name."""


class RunOutput(NamedTuple):
    """The outputs of one run."""

    logits: NDArray[np.float32]
    """Shape (rows, labels)."""
    hidden_states: NDArray[np.float32] | None
    """Shape (rows, tokens, hidden); None unless the next stage reads them."""
    seconds: float
    """Time of the engine's call; of `run_each`, the time since the answer before it."""


class Stage:
    """One member, ready to run; its sessions are made when texts first need them.

    One session runs a micro-batch at a time, with all threads. The other, for bulk work on a CPU, runs as many
    micro-batches at a time as there are threads, one thread each: threads that compute on the same micro-batch wait
    for each other after every operator.
    """

    def __init__(
        self,
        entry: MemberEntry,
        path: Path,
        labels: int,
        execution: Execution,
        *,
        leaves_hidden_states: bool = False,
        check: Check | None = None,
    ) -> None:
        """Prepare to run the ONNX file at `path`.

        `execution`: with the provider as `provider_name` returns it, and a number of threads. `leaves_hidden_states`:
        for the next stage. `check`: called before the member's files are first read. Raises InvalidOption for a
        precision that the provider has no kernels for.
        """
        check_precision(entry.name, entry.precision, execution.provider)
        self.entry = entry
        self.reads = entry.reads
        self.labels = labels
        self._path = path
        self._identities = self._found()
        self._threads = execution.threads or 1
        # Threads wait actively for the next operator (sleeping between operators costs up to a third), but not for
        # the default tens of milliseconds: an idle stage would spin on the cores that the next stage needs.
        # The next segment follows at once; with 500, single texts took twice as long through 12 of them.
        segment = leaves_hidden_states or self.reads == HIDDEN_STATES
        default = _SEGMENT_SPIN_MICROSECONDS if segment else _SPIN_MICROSECONDS
        spin = default if execution.spin_us is None else execution.spin_us
        self._backend = backend_for(replace(execution, spin_us=spin))
        flops = float(entry.cost(TYPICAL_TOKENS)) / TYPICAL_TOKENS
        self.budget = token_budget(self._backend.budget, flops)
        """Padded tokens per micro-batch."""
        self.least = worth_a_thread(self.budget, flops, entry.precision)
        """Padded tokens of a micro-batch that is worth a thread of its own."""
        self._leaves_hidden_states = leaves_hidden_states
        self._check = check
        self._sessions: dict[bool, Any] = {}  # by whether it is that for bulk work
        self._loading = Lock()
        self._device_in_parent = False
        FORKS.register(self)

    @property
    def loaded(self) -> bool:
        """True once a session has been made."""
        return bool(self._sessions)

    @property
    def at_once(self) -> int:
        """Micro-batches of bulk work that can run at a time."""
        return 1 if self._backend.on_device or self._backend.execution.low_memory else self._threads

    def load(self, *, for_bulk: bool = False) -> Any:
        """Return a session, made now if it was not; raise BundleError if the engine cannot use the file.

        If the file was replaced since the other session was made, return that one.
        """
        if for_bulk not in self._sessions:
            with FORKS, self._loading:
                if for_bulk not in self._sessions:
                    if self._sessions and self._replaced():
                        return self._sessions[not for_bulk]
                    self._sessions[for_bulk] = self._make_session(for_bulk)
        return self._sessions[for_bulk]

    def batch(self, inputs: Encoded | HiddenStates, rows: NDArray[np.intp]) -> Batch:
        """Make the micro-batch of some rows, (rows,), of what this stage reads."""
        if not self._sessions:
            self.load()
        return inputs.batch(rows, self._inputs)

    def run(self, batch: Batch) -> RunOutput:
        """Run a micro-batch; raise InferenceError where that fails or answers NaN or infinity."""
        return self._run(self.load(), batch)

    def run_each(
        self, inputs: Encoded | HiddenStates, groups: Sequence[NDArray[np.intp]], *, share_threads: bool
    ) -> Iterator[tuple[Batch, RunOutput]]:
        """Run micro-batches, in order; errors as of `run`.

        `groups`: the rows of each, (rows,). `share_threads`: whether to run several at a time, one thread each.
        """
        if not share_threads:
            for rows in groups:
                batch = self.batch(inputs, rows)
                yield batch, self.run(batch)
            return
        session = self.load(for_bulk=True)

        def run(rows: NDArray[np.intp]) -> tuple[Batch, RunOutput]:
            batch = self.batch(inputs, rows)
            return batch, self._run(session, batch)

        started = perf_counter()
        with ThreadPoolExecutor(self.at_once) as pool:  # not kept: a forked process would not have its threads
            try:
                answers = pool.map(run, groups)
            except RuntimeError:  # Python ends and starts no more threads
                answers = map(run, groups)
            for batch, output in answers:
                ended = perf_counter()
                yield batch, output._replace(seconds=ended - started)
                started = ended

    def after_fork(self) -> None:
        """Leave sessions with threads of their own to the parent process, and make others when texts need them."""
        for for_bulk, session in list(self._sessions.items()):
            if self._backend.survives_fork(for_bulk):
                continue  # used on, in memory that is shared with the parent
            never_destroy(session)
            del self._sessions[for_bulk]
            self._device_in_parent = self._backend.on_device

    def _run(self, session: Any, batch: Batch) -> RunOutput:
        feed = {name: batch[name] for name in self._inputs}
        try:
            with FORKS:
                started = perf_counter()
                answers = session.run(self._outputs, feed)
                seconds = perf_counter() - started
        except Exception as error:  # the engines' own classes share no public base
            raise self._failure(error, batch["attention_mask"].shape) from error
        logits = answers[0]
        expected = (len(batch["attention_mask"]), self.labels)
        if logits.shape != expected:
            raise BundleError(
                f"member {self.entry.name!r} answered logits of shape {logits.shape}, expected {expected}; export again"
            )
        # One call: any NaN or infinity shows in the sum of squares; so do large numbers, of float16 from 256.
        if not math.isfinite(np.vdot(logits, logits)) and not np.isfinite(logits).all():
            raise InferenceError(
                f"member {self.entry.name!r} answered NaN or infinity; check the model, then export again"
            )
        if logits.dtype != np.float32:
            logits = logits.astype(np.float32)
        return RunOutput(logits, answers[1] if self._leaves_hidden_states else None, seconds)

    def _failure(self, error: Exception, shape: tuple[int, ...]) -> InferenceError:
        reason = first_line(error)
        rows, tokens = shape
        batch = f"{rows} text{'s' * (rows != 1)} of {tokens} tokens"
        if out_of_memory(error):
            return InferenceError(
                f"member {self.entry.name!r} ran out of memory on {batch} ({reason}); free "
                "memory, run fewer processes, or export the bundle with a smaller max_length"
            )
        return InferenceError(
            f"member {self.entry.name!r} failed on {batch} ({reason}); check the model, then export again"
        )

    def _make_session(self, for_bulk: bool) -> Any:
        """Make a session, and note which of its inputs and outputs are used."""
        if self._device_in_parent:
            raise InferenceError(
                f"member {self.entry.name!r} ran on {self._backend.execution.provider} before this process was forked, "
                "and a device cannot be used on both sides of a fork; open the bundle in the child process, or "
                "start it by spawn"
            )
        if self._replaced():
            raise BundleError(
                f"{self._path}: replaced since the bundle was opened; open it again (members can be loaded all at once)"
            )
        session = self._backend.load(self.entry, self._path, for_bulk=for_bulk, check=self._check)
        self._use(session.inputs, session.outputs)
        return session

    def _replaced(self) -> bool:
        return self._found() != self._identities

    def _found(self) -> list[FileIdentity | None]:
        return [file_identity(file) for file in self.entry.files(self._path)]

    def _use(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Check a session's inputs and outputs, and take those that this stage needs."""
        allowed = _INPUTS[self.reads]
        if not {allowed[0]} <= set(inputs) <= set(allowed):
            raise BundleError(
                f"{self._path}: has the inputs {', '.join(inputs)}; expected {allowed[0]} and no others than "
                f"{' and '.join(allowed[1:])}"
            )
        used = ["logits"] if "logits" in outputs else list(outputs[:1])
        if self._leaves_hidden_states:
            if _HIDDEN_OUTPUT not in outputs:
                raise BundleError(
                    f"{self._path}: has the outputs {', '.join(outputs)}; expected {_HIDDEN_OUTPUT} among them, which "
                    "the next member reads"
                )
            used.append(_HIDDEN_OUTPUT)
        self._inputs, self._outputs = inputs, used  # at once: the other session may be running
