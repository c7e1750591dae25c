from __future__ import annotations

from time import sleep
from types import SimpleNamespace

import pytest
from cascade_train import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "monotonic", lambda: found.now)
    return found


def test_a_line_every_thirty_seconds(clock: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    bar = progress.Bar("training 2L", 100, "steps", done=40)
    for _ in range(20):
        clock.now += 4
        bar.update(1)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "training 2L: step 42 of 100, about 4 min left",  # the first after 5 s: 8 s for 2 steps, 232 s for 58
        "training 2L: step 50 of 100, about 3 min left",
        "training 2L: step 58 of 100, about 3 min left",
    ]
    bar.show(at_once=True, accuracy=0.5)
    bar.show(at_once=True, accuracy=0.5)
    clock.now += 31
    bar.heartbeat("validating")
    bar.heartbeat("validating")
    assert capfd.readouterr().err.splitlines() == [
        "training 2L: step 60 of 100, accuracy 0.5000",
        "training 2L: step 60 of 100, accuracy 0.5000, validating",
    ]
    bar.close()


def test_what_will_be_done_is_said_first(clock: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    told = progress.Progress("2L", 640, "accuracy")
    arguments = SimpleNamespace(train_batch_size=32)
    state = SimpleNamespace(max_steps=40, global_step=0)
    told.on_train_begin(arguments, state, None)
    assert capfd.readouterr().err == "training 2L: 640 texts, 40 steps of 32, 2 epochs\n"
    told.on_log(arguments, state, None, {"loss": 0.25})
    told.on_evaluate(arguments, state, None, {"eval_accuracy": 0.5})
    assert capfd.readouterr().err == "training 2L: step 0 of 40, loss 0.2500, accuracy 0.5000\n"
    told.on_train_end(arguments, state, None)


def test_work_without_steps_prints_lines(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_SILENCE", 0.01)
    said = ""
    with progress.alive("export"):
        for _ in range(1_000):
            if said.count("\n") < 2:
                sleep(0.01)
                said += capfd.readouterr().err
    assert said.count("\n") >= 2
    assert set(said.splitlines()) == {"export: 0 s so far"}
