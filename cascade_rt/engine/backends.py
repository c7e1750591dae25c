"""Backends: the engines that run a member's ONNX file. ONNX Runtime on the CPU or on a device, and OpenVINO.

`execution` is checked, with a number of threads and a spin duration. `load` returns a session, safe to use from several
threads, with `inputs`, `outputs` and `run(outputs, feed)`; `for_bulk` is one that runs several micro-batches at a time,
with one thread each. It raises BundleError for a file that the engine cannot use. `check` is called before a member's
own files are read; where it is None, they are not to be trusted for a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..errors import BundleError, CascadeError, InferenceError, InvalidOption, first_line
from .batching import DEVICE_TOKEN_BUDGET, TOKEN_BUDGET
from .cpus import spin_duration, usable_threads
from .execution import Execution
from .openvino import Feed, OpenVinoSession
from .prepared import Prepared, saving
from .providers import CPU, OPENVINO, check_exact_kernels, options_for, products_on_cpu, provider_name, saturates

Check = Callable[[], None]
_SLOWER = ["SkipLayerNormFusion"]  # its kernel takes longer than those for its parts
_OUT_OF_MEMORY = (
    "bad_alloc",
    "cannot allocate memory",
    "failed to allocate",
    "out of memory",
    "available memory of",
    "cublas_status_alloc",
)


@dataclass(frozen=True)
class CpuBackend:
    """ONNX Runtime on the CPU."""

    execution: Execution

    budget: ClassVar[int] = TOKEN_BUDGET
    on_device: ClassVar[bool] = False

    def load(self, entry: MemberEntry, path: Path, *, for_bulk: bool, check: Check | None) -> Any:
        """Return a session with all threads, or with one, of the member as prepared for this CPU where that is kept."""
        threads = 1 if for_bulk else self.execution.threads or 1
        packed = self.execution.packed or entry.precision.startswith("int8")  # whose logits would be others
        exact = saturates(entry)  # slower kernels that do not saturate
        remedy = "export again (this CPU has no VNNI: best in fp32)" if exact else "export again"

        def load_prepared(file: Path, threads: int = 1, packed: bool = True) -> Any:
            options = self._options(threads, exact, packed)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return self._session(file, options, remedy)

        def load_itself(written_to: Path | None = None) -> Any:
            options = self._options(threads, exact, packed or written_to is not None)
            if written_to is not None:
                saving(options, written_to)
            return self._session(path, options, remedy, disabled=_SLOWER)

        prepared = Prepared.of(entry, path, self.execution.cache, [exact, *_SLOWER])
        session = None
        if prepared is not None and prepared.ready():
            with suppress(BundleError):  # removed by another process, or damaged
                session = load_prepared(prepared.file, threads, packed)
        if session is None:
            if check is not None:
                check()
            if exact:
                check_exact_kernels(path)
            if prepared is not None and check is not None and prepared.keep(load_itself, load_prepared):
                with suppress(BundleError):
                    session = load_prepared(prepared.file, threads, packed)
        session = session or load_itself()
        return _OnnxSession(session, session.run)

    def survives_fork(self, for_bulk: bool) -> bool:
        """Return whether sessions have one thread: the caller's."""
        return for_bulk or self.execution.threads == 1

    def _options(self, threads: int, exact: bool = False, packed: bool = True) -> Any:
        options = onnxruntime.SessionOptions()
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = not self.execution.low_memory
        options.log_severity_level = 4  # its errors are raised, and told in one line
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(self.execution.spin_us))
        return options

    def _session(self, path: Path, options: Any, remedy: str, disabled: Sequence[str] = ()) -> Any:
        provider = self.execution.provider
        settings = options_for(provider, self.execution.provider_options)
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=[(provider, settings)], disabled_optimizers=list(disabled)
            )
        except Exception as error:
            raise _unloadable(path, error, "ONNX Runtime", remedy) from error
        if (running := session.get_providers()[0]) != provider:
            raise CascadeError(
                f"asked for the provider {provider}, but {running} runs; check its drivers and libraries"
            )
        return session


class DeviceBackend(CpuBackend):
    """ONNX Runtime by another provider than the CPU's."""

    budget = DEVICE_TOKEN_BUDGET
    on_device = True

    def load(self, entry: MemberEntry, path: Path, *, for_bulk: bool, check: Check | None) -> Any:
        """Return a session whose inputs and outputs are bound; refuse one that leaves products to the CPU."""
        if check is not None:
            check()
        options = self._options(self.execution.threads or 1)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = self._session(path, options, "export again")
        if on_cpu := products_on_cpu(session, self.execution.provider):
            raise CascadeError(
                f"asked for the provider {self.execution.provider}, but of member {entry.name!r} it runs no "
                f"{', '.join(sorted(on_cpu))}: they would fall back to the CPU; use the provider cpu or "
                "another precision"
            )

        def run_bound(outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
            """Run so that only the outputs are copied back from the device."""
            binding = session.io_binding()
            for name, array in feed.items():
                binding.bind_cpu_input(name, array)
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            return found

        return _OnnxSession(session, run_bound)

    def survives_fork(self, for_bulk: bool) -> bool:
        """Return False: a device cannot be used on both sides of a fork."""
        return False


@dataclass(frozen=True)
class OpenVinoBackend:
    """OpenVINO on the CPU."""

    execution: Execution

    budget: ClassVar[int] = TOKEN_BUDGET
    on_device: ClassVar[bool] = False

    def load(self, entry: MemberEntry, path: Path, *, for_bulk: bool, check: Check | None) -> Any:
        """Return a session."""
        if check is not None:
            check()
        options = options_for(OPENVINO, self.execution.provider_options)
        try:
            return OpenVinoSession(path, self.execution.threads or 1, options, share_threads=for_bulk)
        except ValueError as error:
            raise InvalidOption("provider_options", options, str(error)) from error
        except Exception as error:
            raise _unloadable(path, error, "OpenVINO", "use the provider cpu, or export in fp32") from error

    def survives_fork(self, for_bulk: bool) -> bool:
        """Return False: its threads stay in the parent process."""
        return False


class _OnnxSession:
    """A session of ONNX Runtime, and how it is run."""

    def __init__(self, session: Any, run: Any) -> None:
        self.session = session
        self.run = run
        self.inputs = [node.name for node in session.get_inputs()]
        self.outputs = [node.name for node in session.get_outputs()]


def usable(execution: Execution) -> Execution:
    """Return settings with the provider's full name and a number of threads; raise InvalidOption for wrong ones."""
    return replace(
        execution,
        provider=provider_name(execution.provider),
        threads=usable_threads(execution.threads),
        spin_us=spin_duration(execution.spin_us),
    )


Backend = CpuBackend | OpenVinoBackend


def backend_for(execution: Execution) -> Backend:
    """Return the backend of a provider, as `provider_name` returns it."""
    if execution.provider == OPENVINO:
        return OpenVinoBackend(execution)
    return CpuBackend(execution) if execution.provider == CPU else DeviceBackend(execution)


def _unloadable(path: Path, error: Exception, engine: str, remedy: str) -> CascadeError:
    reason = first_line(error)
    if out_of_memory(error):
        return InferenceError(
            f"{path}: memory ran out while it was loaded ({reason}); free memory, run fewer processes, or export fewer "
            "or smaller members"
        )
    return BundleError(f"{path}: {engine} cannot load it ({reason}); {remedy}")


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an engine's error says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)
