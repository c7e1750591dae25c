"""Dynamic batching per stage: texts of different requests run together, and are regrouped before every member.

submit -> queue of stage 1 -> micro-batch -> exit rule -> remaining texts, with those of other requests, queue for
stage 2 -> ... -> answers. One thread runs the stages; a lock guards the queues.
"""

from __future__ import annotations

import asyncio
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition, Thread
from time import monotonic
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..bundle.manifest import HIDDEN_STATES, TOKENS
from ..engine.batching import by_length, micro_batches
from ..engine.exit_rules import ExitRule
from ..engine.hidden_states import HiddenStates
from ..engine.providers import CPU, provider_name
from ..engine.step import FIRST, Call, step, step_alone
from ..engine.tokenization import Encoded
from ..errors import CascadeError, InferenceError
from ..runtime import CascadeRuntime
from ..types import Prediction

_WINDOW = 256  # waiting texts among which those of similar length are looked for
_SMOOTHING = 0.1  # of the measured seconds per token


class Overloaded(CascadeError):
    """The queues are full. `retry_after`: whole seconds until there is probably room, at least 1."""

    def __init__(self, seconds: float) -> None:
        self.retry_after = max(1, math.ceil(seconds))
        super().__init__(f"too many texts are waiting; try again in {self.retry_after} s")


class DeadlineExceeded(CascadeError):
    """The answer would have come after the request's deadline."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before all texts were answered")


class Draining(CascadeError):
    """The batcher takes no new texts: another one has its place, or the server stops."""

    retry_after = 1


@dataclass(frozen=True)
class Answer:
    """The answer to one text."""

    prediction: Prediction
    logits: tuple[float, ...]
    """Logits of the member that answered."""
    steps: tuple[tuple[float, ...], ...]
    """Probabilities of every member that the text ran."""
    degraded: bool = False
    """True if a deadline kept the text from the next member."""


class RequestRun(NamedTuple):
    """A run with texts of one request. Times by `time.monotonic`, in seconds."""

    stage: int
    queued: float
    """When the first of these texts began to wait for the stage."""
    started: float
    seconds: float
    texts: int
    """Texts of the request."""
    batch_texts: int
    """Texts of all requests."""


class Ticket:
    """The texts of one request, and their answers so far."""

    def __init__(self, rows: Sequence[int], rule: ExitRule, deadline: float, on_done: Callable[[], object]) -> None:
        """`rows`: how many each text has."""
        texts = len(rows)
        self.rows = rows
        self.rule = rule
        self.state = rule.begin(texts)
        """State of the exit rule."""
        self.answers: list[Answer | None] = [None] * texts
        self.error: Exception | None = None
        self.deadline = deadline
        self.runs: list[RequestRun] = []
        self.on_done = on_done
        self.left = texts
        """Number of texts without an answer."""
        self.from_words = 0
        """Texts whose tokens were put together from those of words."""
        self._noted: list[Answer | None] = [None] * texts

    @property
    def rows_left(self) -> int:
        """Rows of the texts without an answer."""
        return sum(rows for rows, answer in zip(self.rows, self.answers, strict=True) if answer is None)

    @property
    def finished(self) -> bool:
        """True when all texts are answered, or none will be any more."""
        return self.error is not None or not self.left

    def note(self, row: int, answer: Answer) -> None:
        """Remember a member's answer to a text that goes on to the next member."""
        self._noted[row] = answer

    def degraded(self, row: int) -> Answer | None:
        """Return the answer noted last for a text, marked as degraded; None if no member has run."""
        noted = self._noted[row]
        return None if noted is None else replace(noted, degraded=True)

    def settle(self, row: int, answer: Answer) -> None:
        """Answer a text, as its last answer."""
        self.answers[row] = answer
        self.left -= 1

    def fail(self, error: Exception) -> None:
        """Finish with an error; `result` raises it."""
        self.error = error

    def result(self) -> list[Answer]:
        """Return the answers in the order of the texts; raise what went wrong."""
        if self.error is not None:
            raise self.error
        return [answer for answer in self.answers if answer is not None]


class Observer(Protocol):
    """Receiver of each micro-batch and each answer, for metrics."""

    def batch(self, stage: int, waits: Sequence[float], tokens: int, seconds: float) -> None:
        """A micro-batch ran: seconds that each text waited for it, its padded tokens, and the time of the run."""

    def answered(self, answer: Answer) -> None:
        """A text was answered."""


@dataclass(eq=False)
class Waiting:
    """A text that was accepted and has not left."""

    ticket: Ticket
    row: int
    arrived: float
    queued: float
    length: int
    """Its tokens, in all of its rows."""
    truncated: bool
    inputs: dict[str, tuple[Any, int]]
    """Inputs of stages by their kind: the texts or states of a call, and its position there."""
    steps: tuple[tuple[float, ...], ...] = ()


def _by_arrival(text: Waiting) -> float:
    return text.arrived


class Batcher:
    """Answers the texts of many requests by one runtime.

    A stage runs when its texts fill a micro-batch, when one of them has waited `max_wait` seconds for that, or when
    there is nothing else to run; among those stages, the one with the text that arrived first. Its micro-batch is that
    text, and waiting texts of similar length.
    """

    def __init__(
        self,
        runtime: CascadeRuntime,
        *,
        max_wait: float = 0.0,
        max_queue: int = 1000,
        degrade: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """Accept texts from now on, and start the thread.

        Args:
            runtime: Closed by `close`.
            max_wait: Seconds that a text may wait for its micro-batch to fill, while other stages have texts.
            max_queue: Texts that may be accepted and not yet answered; more raise Overloaded. With a stride, each of
                their windows counts.
            degrade: If True, a text without time for the next member gets the answer of the member before.
            observer: Told of batches and answers, in the thread.
        """
        self.runtime = runtime
        self._plan = runtime.plan
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._degrade = degrade
        self._observer = observer
        self._queues: list[list[Waiting]] = [[] for _ in self._plan.stages]
        self._accepted = 0
        self._seconds_per_token = [0.0] * len(self._queues)
        self._draining = False
        first, *others = self._plan.bundle.members
        execution = self._plan.opened.execution
        one_at_a_time = execution.low_memory or provider_name(execution.provider) != CPU  # micro-batches
        self._first_is_quick = not (one_at_a_time or first.layers) and all(
            member.reads == TOKENS for member in others[:1]
        )
        self._started = 0  # texts that other threads run through the first member now
        self._wake = Condition()
        self._thread = Thread(target=self._work, name="cascade-batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what was accepted, and take no more; then stop the thread and close the runtime."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        self._thread.join()
        self.runtime.close()

    def queued(self) -> list[int]:
        """Return how many texts wait for each stage."""
        with self._wake:
            return [len(queue) for queue in self._queues]

    def submit(
        self,
        encoded: Encoded,
        *,
        rule: ExitRule | None = None,
        deadline: float = math.inf,
        on_done: Callable[[], object] = lambda: None,
    ) -> Ticket:
        """Queue texts, and return the ticket on which their answers appear.

        `rule`: instead of the runtime's. `deadline`: by the clock `time.monotonic`. `on_done`: called once, in any
        thread, when the ticket is finished, unless it was cancelled. Raises Overloaded and Draining.
        """
        count = len(encoded)
        rows = [1] * count if encoded.counts is None else encoded.counts.tolist()
        ticket = self._ticket(rows, encoded, rule, deadline, on_done)
        with self._wake:
            self._check_room(sum(rows))
            now = monotonic()
            texts = []
            for row, length in enumerate(encoded.tokens.tolist()):
                inputs: dict[str, tuple[Any, int]] = {TOKENS: (encoded, row)}
                texts.append(Waiting(ticket, row, now, now, max(1, length), encoded.truncated(row), inputs))
            if count:
                self._queues[0] += texts
                self._accepted += sum(rows)
                self._wake.notify()
        if not count:
            on_done()
        return ticket

    def start(
        self, encoded: Encoded, *, rule: ExitRule | None = None, deadline: float = math.inf
    ) -> tuple[Ticket, asyncio.Future[None]]:
        """Queue texts from a coroutine: `submit`, with a future instead of `on_done`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        on_done = partial(loop.call_soon_threadsafe, finish)
        if len(encoded) == 1 and encoded.counts is None and self._first_is_quick and deadline > monotonic():
            ticket = self._started_here(encoded, rule, deadline, on_done)
            if ticket.finished:
                finish()
            return ticket, done
        return self.submit(encoded, rule=rule, deadline=deadline, on_done=on_done), done

    def _started_here(
        self, encoded: Encoded, rule: ExitRule | None, deadline: float, on_done: Callable[[], object]
    ) -> Ticket:
        """Run the first member on a text in this thread, which takes less time than to wake the other one.

        `on_done` is called only if the text goes on to the next member.
        """
        ticket = self._ticket([1], encoded, rule, deadline, on_done)
        now = monotonic()
        text = Waiting(ticket, 0, now, now, max(1, int(encoded.lengths[0])), encoded.truncated(0), {})
        text.inputs[TOKENS] = encoded, 0
        with self._wake:
            self._check_room(1)
            self._accepted += 1
            self._started += 1
        try:
            answer, leaves, seconds = self._first_answer(text, encoded)
        except Exception as error:
            with self._wake:
                self._abandon(ticket, error)
        else:
            with self._wake:
                ticket.runs.append(RequestRun(0, now, now, seconds, 1, 1))
                if leaves:
                    self._settle(ticket, 0, answer)
                else:
                    ticket.note(0, answer)
                    text.queued = monotonic()
                    insort(self._queues[1], text, key=_by_arrival)
        finally:
            with self._wake:
                self._started -= 1
                self._wake.notify()
        return ticket

    def _first_answer(self, text: Waiting, encoded: Encoded) -> tuple[Answer, bool, float]:
        """Return the first member's answer to one text, whether it leaves, and the seconds of the run."""
        batch = self._plan.stages[0].batch(encoded, FIRST)
        done = step_alone(self._plan, 0, batch, text.ticket.rule, text.ticket.state)
        answer = self._answer(0, text, done.output.logits[0].tolist(), done.probabilities)
        if self._observer is not None:
            self._observer.batch(0, [0.0], batch["input_ids"].size, done.output.seconds)
        return answer, done.leaves, done.output.seconds

    def _ticket(
        self,
        rows: Sequence[int],
        encoded: Encoded,
        rule: ExitRule | None,
        deadline: float,
        on_done: Callable[[], object],
    ) -> Ticket:
        ticket = Ticket(rows, self._plan.rule if rule is None else rule, deadline, on_done)
        ticket.from_words = encoded.from_words
        return ticket

    def check_room(self, texts: int) -> None:
        """Raise what `submit` would raise for this many texts, before they are tokenized."""
        with self._wake:
            self._check_room(texts)

    def _check_room(self, texts: int) -> None:
        if self._draining:
            raise Draining("this bundle is no longer served; try again")
        if self._accepted and self._accepted + texts > self._max_queue:
            raise Overloaded(self._backlog())

    def cancel(self, ticket: Ticket) -> None:
        """Take the texts of a ticket out of the queues; nobody waits for them."""
        with self._wake:
            if not ticket.finished:
                self._abandon(ticket, CascadeError("the request was cancelled"))

    def expire(self, ticket: Ticket) -> None:
        """Finish a ticket now, without `on_done`: with answers of smaller members where allowed, else with an error."""
        with self._wake:
            if ticket.finished:
                return
            left = {row: ticket.degraded(row) for row, answer in enumerate(ticket.answers) if answer is None}
            if not self._degrade or None in left.values():
                self._abandon(ticket, DeadlineExceeded())
                return
            self._dequeue(ticket)
            for row, noted in left.items():
                if noted is not None:
                    self._settle(ticket, row, noted)

    def _backlog(self) -> float:
        """Return the seconds that the queues need at least: what they hold, without what goes on to bigger members."""
        tokens = (sum(text.length for text in queue) for queue in self._queues)
        return sum(count * pace for count, pace in zip(tokens, self._seconds_per_token, strict=True))

    def _in_time(self, stage: int, texts: list[Waiting]) -> tuple[list[Waiting], list[Ticket]]:
        """Return the texts whose deadline allows this stage, and the tickets that the others finish."""
        expected = monotonic() + self._seconds_per_token[stage] * len(texts) * max(text.length for text in texts)
        kept, finished = list[Waiting](), list[Ticket]()
        for text in texts:
            ticket = text.ticket
            if ticket.finished:
                continue
            if ticket.deadline >= expected:
                kept.append(text)
            elif self._degrade and (noted := ticket.degraded(text.row)) is not None:
                self._settle(ticket, text.row, noted)
            else:
                self._abandon(ticket, DeadlineExceeded())
            if ticket.finished:
                finished.append(ticket)
        if not kept:  # nothing runs, so nothing is measured: one slow run must not refuse texts for good
            self._seconds_per_token[stage] *= 1 - _SMOOTHING
        return [text for text in kept if not text.ticket.finished], finished

    def _timed(self, stage: int, tokens: int, seconds: float) -> None:
        """Learn a stage's pace from a micro-batch: its padded tokens, and the time of its run."""
        pace = self._seconds_per_token
        pace[stage] += (_SMOOTHING if pace[stage] else 1.0) * (seconds / tokens - pace[stage])

    def _answer(self, stage: int, text: Waiting, logits: list[float], probabilities: list[float]) -> Answer:
        """Return a stage's answer to a text."""
        text.steps += (tuple(probabilities),)
        winner = probabilities.index(max(probabilities))
        rows = text.ticket.rows[text.row]
        prediction = self._plan.prediction(probabilities, winner, stage, text.truncated, rows)
        return Answer(prediction, tuple(logits), text.steps)

    def _settle(self, ticket: Ticket, row: int, answer: Answer) -> None:
        ticket.settle(row, answer)
        self._accepted -= ticket.rows[row]
        found = answer.prediction
        self.runtime.count_text(found.exit, found.layers, from_words=ticket.from_words)
        ticket.from_words = 0  # counted with the first answer
        if self._observer is not None:
            self._observer.answered(answer)

    def _abandon(self, ticket: Ticket, error: Exception) -> None:
        ticket.fail(error if isinstance(error, CascadeError) else InferenceError(str(error)))
        self._accepted -= ticket.rows_left
        self._dequeue(ticket)

    def _dequeue(self, ticket: Ticket) -> None:
        for queue in self._queues:
            queue[:] = [text for text in queue if text.ticket is not ticket]

    def _work(self) -> None:
        while True:
            with self._wake:
                while not any(self._queues):
                    if self._draining and not self._started:
                        return
                    self._wake.wait()
                stage = self._next_stage(monotonic())
                texts, finished = self._in_time(stage, self._take(stage))
            for ticket in finished:
                ticket.on_done()
            if texts:
                self._execute(stage, texts)

    def _next_stage(self, now: float) -> int:
        waiting = [stage for stage, queue in enumerate(self._queues) if queue]
        ready = [
            stage
            for stage in waiting
            if now - min(text.queued for text in self._queues[stage][:_WINDOW]) >= self._max_wait
            or sum(text.length for text in self._queues[stage]) >= self._plan.stages[stage].budget
        ]
        return min(ready, key=lambda stage: self._queues[stage][0].arrived) if ready else waiting[0]

    def _take(self, stage: int) -> list[Waiting]:
        """Take the text that arrived first, and waiting texts of similar length, out of a stage's queue."""
        queue = self._queues[stage]
        lengths = np.array([text.length for text in queue[:_WINDOW]], dtype=np.intp)
        for rows in micro_batches(by_length(lengths), lengths, self._plan.stages[stage].budget):
            if 0 in rows:
                break
        taken = [queue[row] for row in rows]
        for row in sorted(rows.tolist(), reverse=True):
            del queue[row]
        return taken

    def _execute(self, index: int, texts: list[Waiting]) -> None:
        """Run one stage on a micro-batch, and move every text on: out, or to the next stage's queue."""
        stage = self._plan.stages[index]
        picks = [text.inputs[stage.reads] for text in texts]
        inputs: Encoded | HiddenStates = (
            Encoded.gathered(picks) if stage.reads == TOKENS else HiddenStates.gathered(picks)
        )
        places: dict[Ticket, list[int]] = {}
        together: dict[object, list[int]] = {}  # without a state, texts of several requests are decided on at once
        for place, text in enumerate(texts):
            ticket = text.ticket
            places.setdefault(ticket, []).append(place)
            together.setdefault(id(ticket.rule) if ticket.state is None else ticket, []).append(place)
        calls = [
            Call(texts[own[0]].ticket.rule, texts[own[0]].ticket.state, np.array([texts[at].row for at in own]), own)
            for own in map(np.array, together.values())
        ]
        started = monotonic()
        try:
            done = step(self._plan, index, stage, inputs, calls, texts=np.arange(len(texts)), at_once=1)
        except Exception as error:
            self._isolate(index, texts, error)
            return
        seconds, tokens = sum(run.seconds for run in done.runs), sum(run.rows * run.tokens for run in done.runs)
        if self._observer is not None:
            self._observer.batch(index, [started - text.queued for text in texts], tokens, seconds)
        answers = zip(texts, done.logits.tolist(), done.probabilities.tolist(), done.leaving.tolist(), strict=True)
        finished: list[Ticket] = []
        with self._wake:
            for ticket, own in places.items():
                queued = min(texts[place].queued for place in own)
                ticket.runs.append(RequestRun(index, queued, started, seconds, len(own), len(texts)))
            self._timed(index, tokens, seconds)
            now = monotonic()
            for place, (text, logits, probabilities, leaves) in enumerate(answers):
                ticket = text.ticket
                if ticket.finished:
                    continue
                answer = self._answer(index, text, logits, probabilities)
                if leaves:
                    self._settle(ticket, text.row, answer)
                    if ticket.finished:
                        finished.append(ticket)
                    continue
                ticket.note(text.row, answer)
                text.inputs[HIDDEN_STATES] = done.hidden_states, place
                text.queued = now
                insort(self._queues[index + 1], text, key=_by_arrival)
        for ticket in finished:
            ticket.on_done()

    def _isolate(self, index: int, texts: list[Waiting], error: Exception) -> None:
        """Run the texts of each request on their own after an error, so that it reaches only the request it is from."""
        tickets = list(dict.fromkeys(text.ticket for text in texts))
        if len(tickets) > 1:
            for ticket in tickets:
                self._execute(index, [text for text in texts if text.ticket is ticket])
            return
        (ticket,) = tickets
        with self._wake:
            if ticket.finished:
                return
            self._abandon(ticket, error)
        ticket.on_done()
