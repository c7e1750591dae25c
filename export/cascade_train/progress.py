"""Training progress: a bar with loss, validation and time left on a terminal, one line per validation elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Shows the progress of one training run on standard error."""

    def __init__(self, name: str, *metrics: str) -> None:
        """`name`: of what is trained; `metrics`: the validation metrics to show."""
        self._name = name
        self._metrics = metrics
        self._shown: dict[str, float] = {}

    def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar; a resumed run starts where it was."""
        self._bar = tqdm(
            desc=f"training {self._name}",
            total=state.max_steps,
            initial=state.global_step,
            unit=" steps",
            file=sys.stderr,
            disable=None,
        )

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        self._bar.update(1)

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Show the training loss."""
        if "loss" in logs:
            self._shown["loss"] = logs["loss"]
            self._bar.set_postfix(self._shown)

    def on_evaluate(self, arguments: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Show the validation metrics; print a line where there is no bar."""
        self._shown |= {metric: metrics[f"eval_{metric}"] for metric in self._metrics}
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            values = ", ".join(f"{name} {value:.4f}" for name, value in self._shown.items())
            print(f"training {self._name}: step {state.global_step} of {state.max_steps}, {values}", file=sys.stderr)

    def on_train_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish the bar."""
        self._bar.close()
