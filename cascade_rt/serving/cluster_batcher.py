"""The batcher for members that run elsewhere.

submit -> micro-batches of one request -> member 1 -> exit rule -> remaining texts regrouped -> member 2 -> ... ->
answers. All this is in the event loop of `submit`. What batches the texts of many requests is each member.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence, Set
from functools import partial
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import TOKENS
from ..engine.batching import by_length, micro_batches
from ..engine.probabilities import softmax
from ..engine.tokenization import Encoded
from ..errors import CascadeError, InferenceError, first_line
from ..runtime import CascadeRuntime
from .batcher import BaseBatcher, Observer, Run, Ticket, Waiting


class MicroBatch(NamedTuple):
    """What `Observer.batch` is told of a micro-batch."""

    waits: Sequence[float]
    tokens: int
    seconds: float


class Reply(NamedTuple):
    """A member's answer to some texts."""

    logits: NDArray[np.float32]
    """Shape (texts, labels)."""
    runs: Sequence[Run]
    """The micro-batches with these texts; times in seconds since they arrived at the member."""
    batches: Sequence[MicroBatch]
    """All micro-batches that no reply has named yet."""


CallMember = Callable[[Encoded], Awaitable[Reply | CascadeError]]
"""Sends texts to a member. An error of the model is returned; what is raised means that it could not be reached."""


class ClusterBatcher(BaseBatcher):
    """Answers the texts of many requests by members that are called.

    A request goes to a member in several calls, of a micro-batch each, so that replicas share it; and to the next
    member when all of them are back. A call that fails is repeated once: the replica may have died.
    """

    def __init__(
        self,
        runtime: CascadeRuntime,
        members: Sequence[CallMember],
        *,
        max_queue: int = 1000,
        degrade: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """`runtime`: of which no member is loaded. `members`: in its order. The rest: see `BaseBatcher`."""
        super().__init__(runtime, max_queue=max_queue, degrade=degrade, observer=observer)
        self._members = members
        self._tasks: dict[Ticket, asyncio.Task[None]] = {}

    def cancel(self, ticket: Ticket) -> None:
        """Cancel the calls for a ticket; nobody waits for them."""
        super().cancel(ticket)
        self._stop(ticket)

    def expire(self, ticket: Ticket) -> None:
        """Finish a ticket now, without `on_done`: with answers of smaller members where allowed, else with an error."""
        super().expire(ticket)
        self._stop(ticket)

    def close(self) -> None:
        """Wait in another thread until what was accepted is answered, and take no more; then close the runtime."""
        with self._wake:
            self._draining = True
            self._wake.wait_for(lambda: not self._tasks)
        self.runtime.close()

    def _begin(self, ticket: Ticket, texts: list[Waiting]) -> None:
        self._tasks[ticket] = task = asyncio.get_running_loop().create_task(self._answer(ticket, texts))
        task.add_done_callback(partial(self._ended, ticket))

    def _ended(self, ticket: Ticket, task: asyncio.Task[None]) -> None:
        with self._wake:
            del self._tasks[ticket]
            self._wake.notify_all()

    def _stop(self, ticket: Ticket) -> None:
        if ticket in self._tasks:
            self._tasks[ticket].cancel()

    async def _answer(self, ticket: Ticket, texts: list[Waiting]) -> None:
        """Take the texts of a request from member to member until all have left."""
        try:
            for index in range(len(self._members)):
                texts = await self._pass(index, texts)
                if not texts:
                    break
        except Exception as error:
            with self._wake:
                if not ticket.finished:
                    self._abandon(ticket, error if isinstance(error, CascadeError) else InferenceError(str(error)))
        ticket._on_done()

    async def _pass(self, index: int, texts: list[Waiting]) -> list[Waiting]:
        """Run a member on texts, and return those that go on to the next."""
        lengths = np.array([text.length for text in texts], dtype=np.intp)
        groups = micro_batches(by_length(lengths), lengths, self._chain.budget)
        calls = [asyncio.create_task(self._call(index, [texts[row] for row in rows])) for rows in groups]
        try:
            return [text for remaining in await asyncio.gather(*calls) for text in remaining]
        finally:
            for call in calls:
                call.cancel()

    async def _call(self, index: int, texts: list[Waiting]) -> list[Waiting]:
        """Run a member on a micro-batch, as far as deadlines allow, and return the texts that go on to the next."""
        ticket = texts[0].ticket
        with self._wake:
            kept, _ = self._in_time(index, texts)
            self._move(index, set(texts).difference(kept))
        if ticket.error is not None:
            raise ticket.error
        if not kept:
            return []
        sent = monotonic()
        reply = await self._reply(index, Encoded.gathered([text.inputs[TOKENS] for text in kept]))
        answers = zip(kept, reply.logits.tolist(), softmax(reply.logits).tolist(), strict=True)
        with self._wake:
            if ticket.finished:
                return []
            for run in reply.runs:
                ticket.runs.append(run._replace(stage=index, queued=sent + run.queued, started=sent + run.started))
            for batch in reply.batches:
                self._timed(index, batch.tokens, batch.seconds)
            remaining = [text for text, *answer in answers if not self._answered(index, text, *answer)]
            self._move(index, set(kept), remaining)
        if self._observer is not None:
            for batch in reply.batches:
                self._observer.batch(index, *batch)
        return remaining

    async def _reply(self, index: int, encoded: Encoded) -> Reply:
        member = self._members[index]
        try:
            try:
                reply = await member(encoded)
            except Exception:  # to run a member twice does no harm
                reply = await member(encoded)
        except Exception as error:
            name = self.runtime.bundle.members[index].name
            raise InferenceError(f"member {name!r} cannot be reached ({first_line(error)}); try again") from error
        if isinstance(reply, CascadeError):
            raise reply
        return reply

    def _move(self, index: int, texts: Set[Waiting], remaining: Sequence[Waiting] = ()) -> None:
        """Take texts out of a member's queue, and put those that remain into the next one's."""
        if texts:
            self._queues[index][:] = [text for text in self._queues[index] if text not in texts]
        if remaining:
            self._queues[index + 1] += remaining
