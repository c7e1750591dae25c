from __future__ import annotations

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
        "training 2L: step 48 of 100, about 3 min left",  # 32 s for 8 steps: 208 s for 52
        "training 2L: step 56 of 100, about 3 min left",
    ]
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
