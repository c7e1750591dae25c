"""Bulk work on several threads: micro-batches side by side, with the answers of one thread, in order."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeRuntime, InferenceError
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage

from ..toy import WORDS
from .forks import check_a_fork

_DRAW = random.Random(0)
TEXTS = ["", *(" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(1, 45))) for _ in range(400))]  # many micro-batches


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["bundle", "four_segments"])
def test_answers_are_those_of_one_thread_to_the_last_bit(
    name: str, threads: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    runtime, alone = CascadeRuntime(folder, threads=threads), CascadeRuntime(folder, threads=1)
    expected = alone.predict(TEXTS)
    assert len({answer.exit for answer in expected}) > 1
    assert runtime.predict(TEXTS) == expected
    assert runtime.plan.stages[0]._sessions.get(False) is None, "bulk work alone does not load what single texts need"
    assert runtime.predict(TEXTS[5:6])[0].label == expected[5].label
    np.testing.assert_array_equal(runtime.member_logits(TEXTS)[0], alone.member_logits(TEXTS)[0])
    with ThreadPoolExecutor(3) as pool:
        assert all(answers == expected for answers in pool.map(runtime.predict, [TEXTS] * 6))


class Meeting:
    """Stands before a session: each run waits until another one has begun."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._both = Barrier(2, timeout=30)

    def run(self, *arguments: Any) -> Any:
        self._both.wait()
        return self._session.run(*arguments)


def test_micro_batches_run_side_by_side(bundle: Path) -> None:
    same_length = ["the film is good"] * 340  # 4 micro-batches of as many tokens
    runtime = CascadeRuntime(bundle, threads=2, thresholds=0.0)
    expected = runtime.predict(same_length)
    stage = runtime.plan.stages[0]
    stage._sessions[True] = Meeting(stage._sessions[True])
    assert runtime.predict(same_length) == expected


def test_a_failure_names_the_member_and_leaves_the_runtime_usable(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = CascadeRuntime(bundle, threads=2)
    expected = runtime.predict(TEXTS)

    class Failing:
        def run(self, *_: Any) -> Any:
            raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setitem(runtime.plan.stages[0]._sessions, True, Failing())
        with pytest.raises(InferenceError, match=r"'tiny' failed on \d+ texts? of \d+ tokens \(out of luck\)"):
            runtime.predict(TEXTS)
    assert runtime.predict(TEXTS) == expected


def test_a_text_alone_or_much_longer_than_the_others_has_all_threads(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=2)
    runtime.predict(["a film"])
    runtime.predict(["the film is good " * 10, "a film"])
    assert all(True not in stage._sessions for stage in runtime.plan.stages)


def test_no_texts_load_nothing(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=2)
    assert runtime.predict([]) == []
    assert runtime.member_logits([])[0].shape == (3, 0, 3)
    assert all(True not in stage._sessions for stage in runtime.plan.stages)


def test_a_member_that_was_loaded_answers_after_its_bundle_is_gone(copied: Path) -> None:
    alone = CascadeRuntime(copied, threads=1, preload=True)
    preloaded = CascadeRuntime(copied, threads=2, preload=True)
    used = CascadeRuntime(copied, threads=2)
    used.predict(TEXTS)
    shutil.rmtree(copied)
    for runtime in (preloaded, used):
        assert runtime.predict(TEXTS) == alone.predict(TEXTS)
        for text in TEXTS[:5]:
            assert runtime.predict([text]) == alone.predict([text])


def test_a_thread_that_outlives_the_main_thread_is_answered(bundle: Path) -> None:
    program = (
        "import threading\n"
        "from cascade_rt import CascadeRuntime\n"
        f"runtime = CascadeRuntime({str(bundle)!r}, threads=2)\n"
        f"texts = {TEXTS!r}\n"
        "expected = runtime.predict(texts)\n"
        "def work():\n"
        "    threading.main_thread().join()\n"
        "    print(runtime.predict(texts) == expected)\n"
        "threading.Thread(target=work).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_other_devices_run_one_micro_batch_at_a_time(bundle: Path) -> None:
    entry = CascadeRuntime(bundle).bundle.members[0]
    assert Stage(entry, bundle / entry.file, 3, Execution("CUDAExecutionProvider", 8)).at_once == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_answers_too(bundle: Path) -> None:
    check_a_fork(bundle, TEXTS, "cpu")


def test_with_low_memory_one_session_answers_alike(bundle: Path) -> None:
    texts = [" ".join(["film"] * (1 + number % 20)) for number in range(400)]
    runtime = CascadeRuntime(bundle, threads=2, thresholds=1.0, low_memory=True)
    found = [answer.probabilities for answer in runtime.predict(texts)]
    expected = [answer.probabilities for answer in CascadeRuntime(bundle, threads=2, thresholds=1.0).predict(texts)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(list(stage._sessions) == [False] for stage in runtime.plan.stages)
