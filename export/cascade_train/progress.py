"""Progress of long work on standard error: a bar on a terminal, lines elsewhere, one at least every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

_SILENCE = 30.0  # seconds
_FIRST = 5.0  # seconds of work after which the time that is left can be estimated


@contextmanager
def alive(what: str) -> Iterator[None]:
    """Print a line every 30 seconds during work that has no steps, unless standard error is a terminal."""
    done, started = Event(), monotonic()

    def speak() -> None:
        while not done.wait(_SILENCE):
            print(f"{what}: {monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)

    speaker = Thread(target=speak, daemon=True)
    if sys.stderr is not None and not sys.stderr.isatty():
        speaker.start()
    try:
        yield
    finally:
        done.set()


class Bar:
    """A bar of steps; where standard error is no terminal, a line after 5 seconds and then every 30."""

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, passing: bool = False) -> None:
        """`what`: the work, as lines begin; `unit`: a plural. `done`: steps that an earlier run has made.

        `passing`: a bar that is not shown for short work, and not left on the terminal.
        """
        self._what = what
        self._unit = unit
        self._first, self._started = done, monotonic()
        self._last_output = self._started - (0 if passing else _SILENCE - _FIRST)
        self._shown: dict[str, float] = {}
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f" {unit}",
            file=sys.stderr,
            disable=None,
            delay=_SILENCE if passing else 0,
            leave=not passing,
        )
        self._done = done

    def update(self, steps: int) -> None:
        """Count steps that are done."""
        self._bar.update(steps)
        self._done += steps
        self.heartbeat()

    def heartbeat(self, doing: str = "") -> None:
        """Print a line if nothing was printed for a while; `doing`: what goes on, beside the steps."""
        if self._bar.disable and monotonic() - self._last_output > _SILENCE:
            self._say(doing or self._left())

    def show(self, at_once: bool, **values: float) -> None:
        """Show values beside the steps from now on; `at_once`: print them off a terminal, every 5 s at most."""
        self._shown |= values
        self._bar.set_postfix(self._shown)
        last = self._done >= self._bar.total
        if at_once and self._bar.disable and (last or monotonic() - self._last_output > _FIRST):
            self._say("")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _say(self, more: str) -> None:
        self._last_output = monotonic()
        values = [f"{name} {value:.4f}" for name, value in self._shown.items()]
        text = ", ".join([f"{self._unit[:-1]} {self._done} of {self._bar.total}", *values, *([more] if more else [])])
        print(f"{self._what}: {text}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        made = self._done - self._first
        seconds = (monotonic() - self._started) / max(1, made) * (self._bar.total - self._done)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


class Progress(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Shows the progress of one training run."""

    def __init__(self, name: str, texts: int, *metrics: str) -> None:
        """`name`: of what is trained; `texts`: how many it learns from; `metrics`: the validation metrics to show."""
        self._name = name
        self._texts = texts
        self._metrics = metrics

    def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what will be done; a resumed run starts where it was."""
        epochs = state.max_steps * arguments.train_batch_size / self._texts
        what = f"{self._texts} texts, {state.max_steps} steps of {arguments.train_batch_size}, {epochs:.2g} epochs"
        print(f"training {self._name}: {what}", file=sys.stderr, flush=True)
        self._bar = Bar(f"training {self._name}", state.max_steps, "steps", done=state.global_step)

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        self._bar.update(1)

    def on_prediction_step(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that validation goes on."""
        self._bar.heartbeat("validating")

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Show the training loss."""
        if "loss" in logs:
            self._bar.show(at_once=False, loss=logs["loss"])

    def on_evaluate(self, arguments: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Show the validation metrics."""
        self._bar.show(at_once=True, **{metric: metrics[f"eval_{metric}"] for metric in self._metrics})

    def on_train_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish the bar."""
        self._bar.close()
