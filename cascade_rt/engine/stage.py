"""A stage: a member as sessions of ONNX Runtime or OpenVINO, with an explicit number of threads.

It starts from token ids (a member of a cascade) or from the hidden states that the stage before it left (a segment of a
multi-exit model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..bundle.files import file_identity
from ..bundle.manifest import HIDDEN_STATES, TOKENS
from ..errors import BundleError, CascadeError, InferenceError, InvalidOption, first_line
from .batching import DEVICE_TOKEN_BUDGET, TOKEN_BUDGET
from .forks import FORKS, never_destroy
from .openvino import OpenVinoSession
from .providers import CPU, OPENVINO, check_exact_kernels, check_precision, options_for, products_on_cpu, saturates

_SPIN_MICROSECONDS, _SEGMENT_SPIN_MICROSECONDS = 500, 50
_INPUTS = {
    TOKENS: ("input_ids", "attention_mask", "token_type_ids"),
    HIDDEN_STATES: ("hidden_states", "attention_mask"),
}  # the first is required
_HIDDEN_OUTPUT = "last_hidden_state"
Batch = Mapping[str, NDArray[Any]]
"""A padded micro-batch: arrays of shape (rows, tokens, ...) by input name."""

_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "available memory of", "cublas_status_alloc")


class StageOutput(NamedTuple):
    """What one run of a stage gives."""

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
        provider: str,
        threads: int,
        provider_options: Mapping[str, str] | None = None,
        *,
        spin_us: int | None = None,
        leaves_hidden_states: bool = False,
    ) -> None:
        """Prepare to run the ONNX file at `path` by `provider`, as `provider_name` returns it, with `threads`.

        `spin_us`: as for `CascadeRuntime`. `leaves_hidden_states`: whether the next stage reads this one's. Raises
        InvalidOption for a precision that the provider has no kernels for.
        """
        check_precision(entry.name, entry.precision, provider)
        self.entry = entry
        self.reads = entry.reads
        self._path = path
        self._labels = labels
        self._provider = provider
        self._identity = file_identity(path)
        self._provider_options = options_for(provider, provider_options)
        self._threads = threads
        # Threads wait actively for the next operator (sleeping between operators costs up to a third), but not for
        # the default tens of milliseconds: an idle stage would spin on the cores that the next stage needs.
        # The next segment follows at once; with 500, single texts took twice as long through 12 of them.
        segment = leaves_hidden_states or self.reads == HIDDEN_STATES
        default = _SEGMENT_SPIN_MICROSECONDS if segment else _SPIN_MICROSECONDS
        self._spin_us = default if spin_us is None else spin_us
        self._leaves_hidden_states = leaves_hidden_states
        self._sessions: dict[bool, Any] = {}  # by whether it is that for bulk work
        self._loading = Lock()
        self._device_in_parent = False
        FORKS.register(self)

    @property
    def budget(self) -> int:
        """Padded tokens per micro-batch."""
        return DEVICE_TOKEN_BUDGET if self._on_device else TOKEN_BUDGET

    @property
    def loaded(self) -> bool:
        """Whether a session has been made."""
        return bool(self._sessions)

    @property
    def at_once(self) -> int:
        """How many micro-batches of bulk work can run at a time."""
        return 1 if self._on_device else self._threads

    @property
    def _on_device(self) -> bool:
        return self._provider not in (CPU, OPENVINO)

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

    def run(self, batch: Batch) -> StageOutput:
        """Run a micro-batch; raise InferenceError where that fails or answers NaN or infinity."""
        return self._run(self.load(), batch)

    def run_each(
        self, groups: Sequence[NDArray[np.intp]], batch_of: Callable[[NDArray[np.intp]], Batch], *, share_threads: bool
    ) -> Iterator[tuple[Batch, StageOutput]]:
        """Run micro-batches, in order; errors as of `run`.

        `groups`: the rows of each, (rows,). `batch_of` makes the micro-batch of some rows. `share_threads`: whether to
        run several at a time, one thread each.
        """
        if not share_threads:
            for rows in groups:
                batch = batch_of(rows)
                yield batch, self.run(batch)
            return
        session = self.load(for_bulk=True)

        def run(rows: NDArray[np.intp]) -> tuple[Batch, StageOutput]:
            batch = batch_of(rows)
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
            if self._provider == CPU and (for_bulk or self._threads == 1):
                continue  # without threads: used on, in memory that is shared with the parent
            never_destroy(session)
            del self._sessions[for_bulk]
            self._device_in_parent = self._on_device

    def _run(self, session: Any, batch: Batch) -> StageOutput:
        feed = {name: batch[name] for name in self._inputs}
        on_device = self._on_device
        try:
            with FORKS:
                started = perf_counter()
                answers = self._run_bound(session, feed) if on_device else session.run(self._outputs, feed)
                seconds = perf_counter() - started
        except Exception as error:  # the engines' own classes share no public base
            raise self._failure(error, batch["attention_mask"].shape) from error
        logits = answers[0]
        expected = (len(batch["attention_mask"]), self._labels)
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
        return StageOutput(logits, answers[1] if self._leaves_hidden_states else None, seconds)

    def _run_bound(self, session: Any, feed: Batch) -> list[NDArray[Any]]:
        """Run with inputs and outputs bound, so that only the outputs are copied back from the device."""
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def _failure(self, error: Exception, shape: tuple[int, ...]) -> InferenceError:
        reason = first_line(error)
        rows, tokens = shape
        batch = f"{rows} text{'s' * (rows != 1)} of {tokens} tokens"
        if out_of_memory(error):
            return InferenceError(
                f"member {self.entry.name!r} ran out of memory on {batch} ({reason}); free "
                "memory, run fewer processes, or export the bundle with a smaller max_length or in int8"
            )
        return InferenceError(
            f"member {self.entry.name!r} failed on {batch} ({reason}); check the model, then export again"
        )

    def _make_session(self, for_bulk: bool) -> Any:
        """Make a session, and note which of its inputs and outputs are used."""
        if self._device_in_parent:
            raise InferenceError(
                f"member {self.entry.name!r} ran on {self._provider} before this process was forked, and a device "
                "cannot be used on both sides of a fork; open the bundle in the child process, or start it by spawn"
            )
        if self._replaced():
            raise BundleError(
                f"{self._path}: replaced since the bundle was opened; open it again (members can be loaded all at once)"
            )
        if self._provider == OPENVINO:
            session = self._openvino_session(for_bulk)
            self._use(session.inputs, session.outputs)
        else:
            session = self._onnxruntime_session(1 if for_bulk else self._threads)
            self._use([node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()])
        return session

    def _replaced(self) -> bool:
        return file_identity(self._path) != self._identity

    def _openvino_session(self, for_bulk: bool) -> OpenVinoSession:
        try:
            return OpenVinoSession(self._path, self._threads, self._provider_options, share_threads=for_bulk)
        except ValueError as error:
            raise InvalidOption("provider_options", dict(self._provider_options), str(error)) from error
        except Exception as error:
            raise self._unloadable(error, "OpenVINO", "use the provider cpu, or export in fp32") from error

    def _onnxruntime_session(self, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its errors are raised, and told in one line
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(self._spin_us))
        # On CPUs, ONNX Runtime's kernel for a fused addition and normalization is slower than those for its parts.
        disabled = ["SkipLayerNormFusion"] if self._provider == CPU else []
        exact = self._provider == CPU and saturates(self.entry.precision)
        if exact:  # slower kernels that do not saturate
            check_exact_kernels(self._path)
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self._provider != CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(self._path),
                options,
                providers=[(self._provider, self._provider_options)],
                disabled_optimizers=disabled,
            )
        except Exception as error:
            remedy = "export again" + (" (this CPU has no VNNI: best in fp32)" if exact else "")
            raise self._unloadable(error, "ONNX Runtime", remedy) from error
        self._check_provider(session)
        return session

    def _unloadable(self, error: Exception, engine: str, remedy: str) -> CascadeError:
        reason = first_line(error)
        if out_of_memory(error):
            return InferenceError(
                f"{self._path}: memory ran out while it was loaded ({reason}); free memory, run fewer processes, or "
                "use the bundle in int8"
            )
        return BundleError(f"{self._path}: {engine} cannot load it ({reason}); {remedy}")

    def _use(self, inputs: list[str], outputs: list[str]) -> None:
        """Check a session's inputs and outputs, and take those that this stage needs."""
        allowed = _INPUTS[self.reads]
        if not {allowed[0]} <= set(inputs) <= set(allowed):
            raise BundleError(
                f"{self._path}: has the inputs {', '.join(inputs)}; expected {allowed[0]} and no others than "
                f"{' and '.join(allowed[1:])}"
            )
        used = ["logits"] if "logits" in outputs else outputs[:1]
        if self._leaves_hidden_states:
            if _HIDDEN_OUTPUT not in outputs:
                raise BundleError(
                    f"{self._path}: has the outputs {', '.join(outputs)}; expected {_HIDDEN_OUTPUT} among them, which "
                    "the next member reads"
                )
            used.append(_HIDDEN_OUTPUT)
        self._inputs, self._outputs = inputs, used  # at once: the other session may be running

    def _check_provider(self, session: Any) -> None:
        running = session.get_providers()[0]
        if running != self._provider:
            raise CascadeError(
                f"asked for the provider {self._provider}, but {running} runs; check its drivers and libraries"
            )
        if on_cpu := products_on_cpu(session, self._provider):
            raise CascadeError(
                f"asked for the provider {self._provider}, but of member {self.entry.name!r} it runs no "
                f"{', '.join(sorted(on_cpu))}: they would fall back to the CPU; use the provider cpu or "
                "another precision"
            )


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an engine's error says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)
