"""One step of the cascade: run a stage, decide which texts leave, and keep the others in order for the next stage.

`CascadeRuntime.predict` takes the texts of one call through it, the server those of many requests together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import HIDDEN_STATES, TOKENS
from ..types import StageRun
from .batching import bulk_batches, by_length
from .exit_rules import ExitRule
from .hidden_states import HiddenStates
from .plan import Plan
from .stage import Batch, RunOutput, Stage
from .tokenization import Encoded
from .windows import aggregated, rows_of

FIRST = np.zeros(1, dtype=np.intp)
"""The row of the only text of a call."""


def shape(batch: Batch) -> tuple[int, int]:
    """Return the rows and tokens of a micro-batch."""
    rows, tokens = batch["attention_mask"].shape
    return rows, tokens


class Call(NamedTuple):
    """Texts of one call in a step, with their exit rule and its state."""

    rule: ExitRule
    state: Any
    rows: NDArray[np.intp]
    """Their positions in the call, (rows,)."""
    places: NDArray[np.intp] | slice = slice(None)
    """Their positions among the texts of the step; all by default."""


class Step(NamedTuple):
    """A stage's answers to some texts, in order, and which of the texts leave."""

    logits: NDArray[np.float32]
    """Shape (texts, labels)."""
    probabilities: NDArray[np.float64]
    """Shape (texts, labels)."""
    leaving: NDArray[np.bool_]
    """Shape (texts,)."""
    hidden_states: HiddenStates
    """For the next stage, where it reads them."""
    runs: list[StageRun]


def step(
    plan: Plan,
    index: int,
    stage: Stage,
    inputs: Encoded | HiddenStates,
    calls: Sequence[Call],
    *,
    texts: NDArray[np.intp],
    at_once: int,
) -> Step:
    """Run a stage on texts, and decide which of them leave; all do after the plan's last.

    `index`: the stage's position in the plan. `inputs`: what it reads. `calls`: those that the texts are from. `texts`:
    which of `inputs` they are, from the longest to the shortest, (texts,). `at_once`: how many micro-batches may run at
    a time.
    """
    logits, hidden_states, runs = run_texts(plan, index, stage, inputs, texts, at_once)
    probabilities = plan.task.probabilities(logits)
    leaving = np.ones(len(texts), dtype=bool)
    for call in calls if index + 1 < len(plan.stages) else ():
        observed = call.rule.observed(plan.task, probabilities[call.places])
        leaving[call.places] = call.rule.leaving(call.state, index, call.rows, observed)
    return Step(logits, probabilities, leaving, hidden_states, runs)


class StepAlone(NamedTuple):
    """A stage's answer to one text of one row."""

    output: RunOutput
    probabilities: list[float]
    winner: int
    """Its most probable class."""
    leaves: bool


def step_alone(plan: Plan, index: int, batch: Batch, rule: ExitRule, state: Any) -> StepAlone:
    """Run a stage on one text of one row, and decide whether it leaves: `step`, with nothing to order or to regroup.

    `batch`: the text for that stage. `rule` and `state`: those of the text's call.
    """
    output = plan.stages[index].run(batch)
    probabilities, winner = plan.task.probabilities_of_one(output.logits[0])
    last = index + 1 == len(plan.stages)
    leaves = last or rule.leaves_alone(state, index, plan.task, probabilities, winner)
    return StepAlone(output, probabilities, winner, leaves)


def run_texts(
    plan: Plan, index: int, stage: Stage, inputs: Encoded | HiddenStates, texts: NDArray[np.intp], at_once: int
) -> tuple[NDArray[np.float32], HiddenStates, list[StageRun]]:
    """Run a stage on all rows of texts in micro-batches; arguments as of `step`.

    Returns the logits in the order of `texts`, the hidden states that it left, and the runs. The windows of a text are
    in one micro-batch where their lengths and its size allow, and become one answer here.
    """
    rows, counts = rows_of(inputs.counts, texts), inputs.counts
    if counts is not None:
        order = by_length(inputs.lengths[rows])
        rows = rows[order]
    groups, share_threads = bulk_batches(rows, inputs.lengths, stage.budget, at_once, stage.least)
    logits = np.empty((len(rows), stage.labels), dtype=np.float32)
    left = HiddenStates(inputs.lengths, counts)
    runs: list[StageRun] = []
    done = 0
    outputs = stage.run_each(inputs, groups, share_threads=share_threads)
    for some, (batch, output) in zip(groups, outputs, strict=True):
        logits[done : done + len(some)] = output.logits
        left.put(some, batch["attention_mask"], output.hidden_states)
        runs.append(StageRun(index, stage.entry.name, *shape(batch), output.seconds))
        done += len(some)
    if counts is not None and plan.windows is not None:
        logits[order] = logits.copy()
        logits = aggregated(plan.task, logits, counts[texts], plan.windows.aggregate)
    return logits, left, runs


@dataclass
class Journey:
    """The texts of one call between two stages, which may run in several processes.

    Pickling keeps the tokens, or hidden states, of the texts that have not left, and drops those of the others.
    """

    probabilities: NDArray[np.float64]
    """Those of the member that ran last, shape (texts, labels)."""
    exits: NDArray[np.intp]
    """Which member answered, shape (texts,); valid for texts that have left."""
    waiting: NDArray[np.intp]
    """The texts that have not left, from the longest to the shortest."""
    truncated: list[bool]
    """For each text, whether tokens were cut off."""
    state: Any
    """The exit rule's state."""
    inputs: dict[str, Encoded | HiddenStates]
    """Inputs of stages by their kind."""
    tokenization_seconds: float = 0.0
    from_words: int = 0
    """Texts whose tokens were put together from those of words."""
    runs: list[StageRun] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tokens and hidden states of texts that have left."""
        kept = {kind: read.kept(self.waiting) for kind, read in self.inputs.items()}
        return vars(replace(self, inputs=kept))

    @property
    def rows(self) -> NDArray[np.intp] | None:
        """Rows of each text, (texts,); None where each has one."""
        return self.inputs[TOKENS].counts

    def advance(self, plan: Plan, index: int, stage: Stage | None = None) -> None:
        """Take the texts that have not left through a stage; `stage`: None for the plan's own."""
        texts = self.waiting
        if not texts.size:
            return
        stage = stage or plan.stages[index]
        calls = [Call(plan.rule, self.state, texts)]
        done = step(plan, index, stage, self.inputs[stage.reads], calls, texts=texts, at_once=stage.at_once)
        self.inputs[HIDDEN_STATES] = done.hidden_states
        self.probabilities[texts] = done.probabilities
        self.exits[texts[done.leaving]] = index
        self.waiting = texts[~done.leaving]
        self.runs += done.runs
