"""Forks wait for calls of other threads, and children make anew what needs threads."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import onnxruntime
import pytest

from cascade_rt import BundleError, CascadeRuntime, InferenceError, read_bundle
from cascade_rt.engine import forks, tokenization
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.forks import FORKS
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.tokenization import Encoded

from ...toy import WORDS
from ..forks import ended, forked

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
TEXTS = [f"{one} {other}" for one in WORDS[:8] for other in WORDS[8:20]]


class Held:
    """Calls a function, but the first call waits until `release` is set."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.entered.is_set():
            self.entered.set()
            assert self.release.wait(20)
        return self._call(*arguments, **options)


class Wrapped:
    """An object of another library with one method replaced."""

    def __init__(self, wrapped: Any, name: str, method: Callable[..., Any]) -> None:
        self._wrapped = wrapped
        setattr(self, name, method)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _held_run(runtime: CascadeRuntime, monkeypatch: pytest.MonkeyPatch) -> Held:
    stage = runtime.plan.stages[0]
    session = stage.load()
    held = Held(session.run)
    stage._sessions[False] = Wrapped(session, "run", held)
    return held


def _held_load(runtime: CascadeRuntime, monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held(onnxruntime.InferenceSession)
    monkeypatch.setattr(onnxruntime, "InferenceSession", held)
    return held


def _held_tokenization(runtime: CascadeRuntime, monkeypatch: pytest.MonkeyPatch) -> Held:
    tokenizer = runtime.plan.tokenizer
    held = Held(tokenizer._tokenizer.encode)
    monkeypatch.setattr(tokenizer, "_tokenizer", Wrapped(tokenizer._tokenizer, "encode", held))
    return held


def _held_long_text(runtime: CascadeRuntime, monkeypatch: pytest.MonkeyPatch) -> Held:
    monkeypatch.setattr(tokenization, "_LONGEST", 3)
    tokenizer = runtime.plan.tokenizer
    held = Held(tokenizer._tokenizer.to_str)
    monkeypatch.setattr(tokenizer, "_tokenizer", Wrapped(tokenizer._tokenizer, "to_str", held))
    return held


def _held_count(runtime: CascadeRuntime, monkeypatch: pytest.MonkeyPatch) -> Held:
    lock = runtime._counting
    held = Held(lock.__enter__)

    class Lock:
        def __enter__(self) -> Any:
            return held()

        def __exit__(self, *error: Any) -> None:
            lock.__exit__(*error)

    runtime._counting = Lock()  # type: ignore[assignment]
    return held


def _until(condition: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not condition():
        assert monotonic() < end, "it has not come so far"
        sleep(0.002)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hold", [_held_run, _held_load, _held_tokenization, _held_long_text, _held_count])
def test_a_fork_waits_for_a_call_of_another_thread(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    hold: Callable[[CascadeRuntime, pytest.MonkeyPatch], Held],
) -> None:
    right = CascadeRuntime(bundle, threads=threads).predict(TEXTS[:1])
    runtime = CascadeRuntime(bundle, threads=threads, word_cache=hold not in (_held_tokenization, _held_long_text))
    held = hold(runtime, monkeypatch)
    answers: list[Any] = []
    children: list[int] = []

    def predict() -> None:
        answers.append(runtime.predict(TEXTS[:1]))

    running = threading.Thread(target=predict)
    running.start()
    assert held.entered.wait(20)
    forking = threading.Thread(target=lambda: children.append(forked(lambda: runtime.predict(TEXTS[:1]) == right)))
    forking.start()
    _until(lambda: FORKS._pending == 1)
    later = threading.Thread(target=predict)  # waits at its first call, which is the tokenizer's
    later.start()
    sleep(0.02)
    assert not children, "the fork waits"
    assert not answers, "and holds off other calls"
    held.release.set()
    for thread in (running, forking, later):
        thread.join(20)
    assert ended(children[0]) == 0
    assert answers == [right, right]
    assert not FORKS._inside
    assert not FORKS._pending


def test_a_child_counts_tokens_that_were_being_counted_at_the_fork() -> None:
    held = Held(lambda: 3)

    class Tokens:
        def __len__(self) -> int:
            return int(held())

    counting = threading.Thread(target=lambda: Encoded([Tokens()], {}, 0.0).lengths)
    counting.start()
    assert held.entered.wait(20)
    child = forked(lambda: Encoded([], {}, 0.0).lengths.tolist() == [])
    held.release.set()
    counting.join(20)
    assert ended(child) == 0


def test_forks_at_the_same_time_each_wait(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    held = _held_run(runtime, monkeypatch)
    running = threading.Thread(target=runtime.predict, args=(TEXTS[:1],))
    running.start()
    assert held.entered.wait(20)
    children: list[int] = []
    forking = [
        threading.Thread(target=lambda: children.append(forked(lambda: bool(runtime.predict(TEXTS))))) for _ in range(3)
    ]
    for thread in forking:
        thread.start()
    _until(lambda: FORKS._pending == 3)
    held.release.set()
    for thread in [running, *forking]:
        thread.join(20)
    assert [ended(child) for child in children] == [0, 0, 0]
    assert not FORKS._pending


def test_a_thread_forks_in_its_own_call(bundle: Path) -> None:
    """As the handler of a signal does that arrives in a run."""
    runtime = CascadeRuntime(bundle, threads=1)
    right = runtime.predict(TEXTS)
    with FORKS:
        child = forked(lambda: runtime.predict(TEXTS) == right and len(FORKS._inside) == 1)
        assert runtime.predict(TEXTS) == right
    assert ended(child) == 0
    assert not FORKS._inside


def test_a_handler_of_a_signal_predicts_while_a_fork_waits_for_the_call_that_it_interrupts(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    right = runtime.predict(TEXTS[:1])
    children: list[int] = []
    found: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: found.append(runtime.predict(TEXTS[:1])))
    try:
        with FORKS:
            forking = threading.Thread(target=lambda: children.append(forked(lambda: True)))
            forking.start()
            _until(lambda: FORKS._pending == 1)
            signal.raise_signal(signal.SIGUSR1)
            assert found == [right]
        forking.join(20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended(children[0]) == 0


def test_a_fork_goes_ahead_where_a_run_does_not_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    held = _held_run(runtime, monkeypatch)
    running = threading.Thread(target=runtime.predict, args=(TEXTS[:1],))
    running.start()
    assert held.entered.wait(20)
    monkeypatch.setattr(forks, "LONGEST_WAIT", 0.01)
    with pytest.warns(RuntimeWarning, match="forked in a run that does not end"):
        child = forked(lambda: True)
    held.release.set()
    running.join(20)
    assert ended(child) == 0
    assert not FORKS._inside


def test_a_trace_and_a_stream_may_fork(bundle: Path) -> None:
    children: list[int] = []
    runtime = CascadeRuntime(bundle, threads=2)
    right = runtime.predict(TEXTS)
    traced = runtime.with_trace(lambda _: children.append(forked(lambda: runtime.predict(TEXTS) == right)))
    assert traced.predict(TEXTS) == right
    stream = runtime.predict_iter(TEXTS, chunk_size=5)
    assert next(stream) == right[0]
    children.append(forked(lambda: list(stream) == right[1:]))
    assert [ended(child) for child in children] == [0, 0]
    assert list(stream) == right[1:]


@pytest.mark.parametrize("threads", [1, 2])
def test_pools_of_processes_answer_beside_a_thread_that_predicts(bundle: Path, threads: int) -> None:
    """As servers that fork their workers and jobs with `multiprocessing` do."""
    runtime = CascadeRuntime(bundle, threads=threads)
    right = runtime.predict(TEXTS)
    stop = threading.Event()
    running = threading.Thread(target=lambda: [runtime.predict(TEXTS) for _ in iter(stop.is_set, True)])
    running.start()
    try:
        with multiprocessing.get_context("fork").Pool(3, initializer=signal.alarm, initargs=(20,)) as pool:
            parts = [TEXTS[start::4] for start in range(4)]
            found = pool.map_async(runtime.predict, parts).get(20)
    finally:
        stop.set()
        running.join(20)
    assert found == [right[start::4] for start in range(4)]


def test_a_child_of_a_child_answers_and_closes(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=2)
    right = runtime.predict(TEXTS)

    def close() -> bool:
        same = runtime.predict(TEXTS) == right
        runtime.close()
        gc.collect()  # destroys sessions of its own; inherited ones would wait for their threads
        return same

    assert ended(forked(lambda: runtime.predict(TEXTS[:1]) == right[:1] and ended(forked(close)) == 0)) == 0
    assert ended(forked(close)) == 0


@pytest.mark.parametrize(("threads", "made"), [(1, 0), (2, 3)])
def test_sessions_of_one_thread_are_shared_with_the_parent(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int, made: int
) -> None:
    runtime = CascadeRuntime(bundle, threads=threads, thresholds=1.0)
    right = runtime.predict(TEXTS), runtime.predict(TEXTS[:1])
    files: list[str] = []
    session = onnxruntime.InferenceSession

    def counted(path: str, *arguments: Any, **options: Any) -> Any:
        files.append(path)
        return session(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    child = forked(lambda: (runtime.predict(TEXTS), runtime.predict(TEXTS[:1])) == right and len(files) == made)
    assert ended(child) == 0
    assert not files


def test_a_child_uses_the_tokenizer_where_its_threads_were_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    runtime = CascadeRuntime(bundle, threads=1)
    right = runtime.predict(TEXTS)
    assert ended(forked(lambda: runtime.predict(TEXTS) == right)) == 0
    assert ended(forked(lambda: CascadeRuntime(bundle, threads=1).predict(TEXTS) == right)) == 0


def test_a_child_does_not_load_another_bundle(copied: Path) -> None:
    runtime = CascadeRuntime(copied, threads=2)
    runtime.predict(TEXTS[:1])
    model = copied / "tiny.onnx"
    replacement = copied / "new.onnx"
    replacement.write_bytes(model.read_bytes())
    replacement.replace(model)

    def refused() -> bool:
        with pytest.raises(BundleError, match="replaced since the bundle was opened; open it again"):
            runtime.predict(TEXTS[:1])
        return True

    assert ended(forked(refused)) == 0
    assert runtime.predict(TEXTS[:1])


def test_a_device_is_not_used_on_both_sides_of_a_fork(bundle: Path) -> None:
    opened = read_bundle(bundle)
    entry = replace(opened.members[0])
    stage = Stage(entry, bundle / entry.file, 3, Execution("CUDAExecutionProvider", 1))
    stage.after_fork()  # nothing was started: the child may
    stage._sessions[False] = object()
    stage.after_fork()
    with pytest.raises(InferenceError, match="ran on CUDAExecutionProvider before this process was forked.*spawn"):
        stage.load()
