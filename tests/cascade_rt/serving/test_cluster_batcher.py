"""The batcher of a cluster, with members in this process: answers, limits, deadlines and errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeError, CascadeRuntime, InferenceError, Prediction
from cascade_rt.engine.tokenization import Encoded
from cascade_rt.serving.batcher import Answer, DeadlineExceeded, Draining, Overloaded, Run, Ticket
from cascade_rt.serving.cluster_batcher import ClusterBatcher, MicroBatch, Reply
from cascade_rt.types import Text

from .test_batcher import TEXTS, Recorder, assert_same


class FakeMember:
    """Runs a stage in this process; counts calls, and can be held back, fail or refuse texts."""

    def __init__(self, runtime: CascadeRuntime, index: int) -> None:
        self._stage = runtime.chain.stages[index]
        self.calls: list[int] = []
        """Texts of each call."""
        self.cancelled = 0
        self.open = asyncio.Event()
        self.open.set()
        self.holds: Callable[[Encoded], bool] = lambda encoded: not self.open.is_set()
        self.dies: Callable[[], bool] = lambda: False
        self.refuses: Callable[[Encoded], bool] = lambda encoded: False

    async def __call__(self, encoded: Encoded) -> Reply | CascadeError:
        self.calls.append(len(encoded.lengths))
        try:
            await asyncio.sleep(0)
            if self.holds(encoded):
                await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.dies():
            raise ConnectionError("the replica died")
        if self.refuses(encoded):
            return InferenceError("the member answered NaN")
        batch = encoded.batch(np.arange(len(encoded.lengths)))
        logits, _, seconds = self._stage.run(batch)
        count, tokens = batch["attention_mask"].shape
        run = Run(0, 0.0, 0.25, seconds, count, count)
        return Reply(logits, [run], [MicroBatch([0.25] * count, count * tokens, seconds)])


class Cluster:
    """A batcher and its members."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.local = CascadeRuntime(folder, threads=1)
        self.members = [FakeMember(self.local, index) for index in range(len(self.local.bundle.members))]
        self.batcher = ClusterBatcher(CascadeRuntime(folder, threads=1), self.members, **settings)
        self.never, self.at_once = (self.local.with_thresholds(tau).exit_rule for tau in (1.0, 0.0))

    def start(self, texts: Sequence[Text], **settings: Any) -> tuple[Ticket, asyncio.Future[None]]:
        return self.batcher.start(self.local.chain.tokenizer.encode(texts), **settings)

    async def answer(self, texts: Sequence[Text], **settings: Any) -> list[Answer]:
        ticket, done = self.start(texts, **settings)
        await asyncio.wait_for(done, 30)
        return ticket.result()

    async def until_called(self, member: int, calls: int = 1) -> None:
        while len(self.members[member].calls) < calls:
            await asyncio.sleep(0)

    async def close(self) -> None:
        await asyncio.to_thread(self.batcher.close)
        assert self.batcher.queued() == [0] * len(self.members)
        assert self.batcher._accepted == 0
        assert not self.batcher._tasks


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def predictions(answers: Sequence[Answer]) -> list[Prediction]:
    return [answer.prediction for answer in answers]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fixture", ["bundle", "pair_bundle"])
def test_answers_are_those_of_predict_also_where_replicas_die(
    fixture: str, seed: int, request: pytest.FixtureRequest
) -> None:
    """100 requests of all sizes at once, with thresholds of their own; a tenth of the calls fails."""
    draw = random.Random(seed)
    folder: Path = request.getfixturevalue(fixture)

    async def test() -> None:
        recorder = Recorder()
        cluster = Cluster(folder, max_queue=10_000, observer=recorder)
        failed: set[int] = set()

        def dies() -> bool:
            task = id(asyncio.current_task())  # the second attempt is in the same one
            if task in failed or draw.random() > 0.1:
                failed.discard(task)
                return False
            failed.add(task)
            return True

        for member in cluster.members:
            member.dies = dies
        texts: list[Text] = list(TEXTS)
        if folder.name == "pairs":
            texts = list(zip(TEXTS, reversed(TEXTS), strict=True))
        requests = [
            (draw.choices(texts, k=draw.choice([0, 1, 1, 2, 5, 40])), draw.choice([None, 0.5, 1.0])) for _ in range(100)
        ]
        runtimes = [cluster.local if tau is None else cluster.local.with_thresholds(tau) for _, tau in requests]
        found = await asyncio.gather(
            *(
                cluster.answer(some, rule=runtime.exit_rule)
                for (some, _), runtime in zip(requests, runtimes, strict=True)
            )
        )
        for answers, (some, _), runtime in zip(found, requests, runtimes, strict=True):
            assert_same(predictions(answers), runtime.predict(some))
            assert all(len(answer.steps) == answer.prediction.exit + 1 for answer in answers)
            assert all(answer.steps[-1] == answer.prediction.probabilities for answer in answers)
        everything = [answer for answers in found for answer in answers]
        exits = [answer.prediction.exit for answer in everything]
        assert cluster.batcher.runtime.stats().exits == [exits.count(at) for at in range(len(cluster.members))]
        assert sorted(map(id, recorder.answers)) == sorted(map(id, everything))
        for stage in range(len(cluster.members)):
            assert sum(texts for at, texts, _ in recorder.batches if at == stage) == sum(at >= stage for at in exits)
        assert sum(len(member.calls) for member in cluster.members) > len(recorder.batches), "some calls failed"
        await cluster.close()

    run(test())


def test_a_large_request_goes_in_micro_batches_and_is_regrouped(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle, max_queue=10_000)
        cluster.members[0].open.clear()
        ticket, done = cluster.start(TEXTS, rule=cluster.never)
        await asyncio.sleep(0.01)
        first, lengths = list(cluster.members[0].calls), cluster.local.chain.tokenizer.encode(TEXTS).lengths
        assert sum(first) == len(TEXTS), "all at once, for several replicas"
        assert len(first) >= lengths.sum() / cluster.local.chain.budget
        assert cluster.batcher.queued() == [len(TEXTS), 0, 0]
        cluster.members[0].open.set()
        await done
        assert len(ticket.result()) == len(TEXTS)
        assert cluster.members[1].calls == first
        few = [text for text, exit in zip(TEXTS, cluster.local.predict(TEXTS), strict=True) if exit.exit == 2][:3]
        await cluster.answer([*few, *["film"] * 100])
        assert cluster.members[2].calls[len(first) :] == [len(few)], "in one call, from wherever they came"
        await cluster.close()

    run(test())


def test_runs_are_in_the_time_of_the_ingress(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle)
        before = monotonic()
        ticket, done = cluster.start(["the film"], rule=cluster.never)
        await done
        assert [(found.stage, found.texts, found.batch_texts) for found in ticket.runs] == [
            (0, 1, 1),
            (1, 1, 1),
            (2, 1, 1),
        ]
        assert all(found.started == pytest.approx(found.queued + 0.25) for found in ticket.runs)
        assert all(pace > 0 for pace in cluster.batcher._seconds_per_token)
        assert before <= ticket.runs[0].queued <= ticket.runs[1].queued <= ticket.runs[2].queued <= monotonic()
        await cluster.close()

    run(test())


def test_a_member_that_cannot_be_reached(bundle: Path) -> None:
    """One request fails, with the member's name; it is called twice, and others are answered."""

    async def test() -> None:
        cluster = Cluster(bundle)
        cluster.members[1].dies = lambda: True
        with pytest.raises(InferenceError, match=r"member 'small' cannot be reached \(the replica died\)"):
            await cluster.answer(["the film"], rule=cluster.never)
        assert [member.calls for member in cluster.members] == [[1], [1, 1], []]
        assert len(await cluster.answer(TEXTS, rule=cluster.at_once)) == len(TEXTS)
        await cluster.close()

    run(test())


def test_an_error_of_the_model_reaches_only_its_request(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle)
        cluster.members[1].refuses = lambda encoded: len(encoded.lengths) == 2
        good, bad = await asyncio.gather(
            cluster.answer(["the film"] * 3, rule=cluster.never),
            cluster.answer(["the film"] * 2, rule=cluster.never),
            return_exceptions=True,
        )
        assert isinstance(bad, InferenceError)
        assert str(bad) == "the member answered NaN"
        assert isinstance(good, list)
        assert sorted(cluster.members[1].calls) == [2, 3], "it would fail again, so it is not repeated"
        await cluster.close()

    run(test())


LONG = " ".join(["film"] * 60)
"""The first micro-batch of a request in which all others are short."""


def test_a_failed_call_ends_the_others_of_its_request(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle)
        first = cluster.members[0]
        first.open.clear()
        first.holds = lambda encoded: encoded.lengths.max() > 10
        first.refuses = lambda encoded: encoded.lengths.max() < 10
        with pytest.raises(InferenceError, match="NaN"):
            await cluster.answer([*["film"] * 100, *[LONG] * 10])
        await asyncio.sleep(0)
        assert first.cancelled == 1
        await cluster.close()

    run(test())


@pytest.mark.parametrize("held", [True, False])
def test_a_call_without_time_ends_the_others_of_its_request(bundle: Path, held: bool) -> None:
    """There is time for a call with a long text, not for one with many short ones; the first is held or not."""

    async def test() -> None:
        cluster = Cluster(bundle)
        first = cluster.members[0]
        first.open.clear()
        first.holds = lambda encoded: held
        cluster.batcher._seconds_per_token[0] = 1.0
        with pytest.raises(DeadlineExceeded):
            await cluster.answer([*["film"] * 100, LONG], deadline=monotonic() + 200)
        await asyncio.sleep(0.01)
        assert first.calls == [4]
        assert first.cancelled == held
        await cluster.close()

    run(test())


def test_a_request_without_texts_is_done_at_once(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle)
        done = list[int]()
        empty = cluster.local.chain.tokenizer.encode([])
        assert cluster.batcher.submit(empty, on_done=lambda: done.append(1)).result() == []
        await cluster.close()
        assert done == [1]

    run(test())


def test_full_queues_refuse_at_once_and_take_texts_again(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle, max_queue=10)
        cluster.members[1].open.clear()
        _, first = cluster.start(TEXTS[:8], rule=cluster.never)
        await cluster.until_called(1)
        cluster.batcher._seconds_per_token[1] = 0.5
        for refused in (lambda: cluster.start(TEXTS[:3]), lambda: cluster.batcher.check_room(3)):
            with pytest.raises(Overloaded) as raised:
                refused()
            tokens = cluster.local.chain.tokenizer.encode(TEXTS[:8]).lengths.sum()
            assert raised.value.retry_after == np.ceil(tokens / 2), "the texts that are at the second member"
        _, second = cluster.start(TEXTS[:2], rule=cluster.at_once)
        cluster.members[1].open.set()
        await asyncio.gather(first, second)
        assert len(await cluster.answer(TEXTS[:40])) == 40, "one request is never refused by an idle server"
        await cluster.close()

    run(test())


def test_a_cancelled_request_makes_room_and_ends_its_calls(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle, max_queue=50)
        cluster.members[1].open.clear()
        ticket, done = cluster.start(TEXTS[:50], rule=cluster.never)
        await cluster.until_called(1)
        cluster.batcher.cancel(ticket)
        unborn, unborn_done = cluster.start(TEXTS[:50])
        cluster.batcher.cancel(unborn)  # before its first call
        await asyncio.sleep(0.01)
        assert cluster.members[1].cancelled == len(cluster.members[1].calls)
        assert cluster.batcher.queued() == [0, 0, 0]
        assert not done.done()
        assert not unborn_done.done()
        cluster.members[1].open.set()
        assert len(await cluster.answer(TEXTS[:50])) == 50
        cluster.batcher.cancel(ticket)
        await cluster.close()

    run(test())


@pytest.mark.parametrize("degrade", [True, False])
def test_a_text_without_time_for_the_next_member(bundle: Path, degrade: bool) -> None:
    """The pace of the last member says that it takes an hour: what gets there in time for the others is degraded."""

    async def test() -> None:
        cluster = Cluster(bundle, degrade=degrade)
        cluster.batcher._seconds_per_token[2] = 3600.0
        if not degrade:
            with pytest.raises(DeadlineExceeded):
                await cluster.answer(TEXTS, deadline=monotonic() + 600)
        else:
            found = await cluster.answer(TEXTS, deadline=monotonic() + 600)
            assert_same(predictions(found), cluster.local.with_members(["tiny", "small"]).predict(TEXTS))
            limit = cluster.local.thresholds[1]
            assert [one.degraded for one in found] == [
                one.prediction.exit == 1 and one.prediction.score <= limit for one in found
            ]
            assert 0 < sum(one.degraded for one in found) < len(found)
        assert not cluster.members[2].calls
        await cluster.close()

    run(test())


def test_a_deadline_that_has_passed_calls_no_member(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle, degrade=True)
        with pytest.raises(DeadlineExceeded):
            await cluster.answer(TEXTS, deadline=monotonic() - 1)
        assert not cluster.members[0].calls
        await cluster.close()

    run(test())


@pytest.mark.parametrize("degrade", [True, False])
def test_expire_answers_with_what_is_there(bundle: Path, degrade: bool) -> None:
    async def test() -> None:
        cluster = Cluster(bundle, degrade=degrade)
        for held, answered in ((0, False), (2, degrade)):
            cluster.members[held].open.clear()
            ticket, done = cluster.start(TEXTS[:5], rule=cluster.never)
            await cluster.until_called(held)
            cluster.batcher.expire(ticket)
            if answered:
                assert [(one.degraded, one.prediction.exit) for one in ticket.result()] == [(True, 1)] * 5
            else:
                with pytest.raises(DeadlineExceeded):
                    ticket.result()
            await asyncio.sleep(0.01)
            assert cluster.members[held].cancelled == len(cluster.members[held].calls)
            assert not done.done()
            cluster.members[held].open.set()
        await cluster.close()

    run(test())


def test_close_answers_what_was_accepted_and_refuses_the_rest(bundle: Path) -> None:
    async def test() -> None:
        cluster = Cluster(bundle)
        cluster.members[0].open.clear()
        tickets = [cluster.start(TEXTS[:50])[0] for _ in range(5)]
        closing = asyncio.create_task(cluster.close())
        while not cluster.batcher._draining:
            await asyncio.sleep(0)
        with pytest.raises(Draining):
            cluster.start(["the film"])
        assert not closing.done()
        cluster.members[0].open.set()
        await closing
        assert all(len(ticket.result()) == 50 for ticket in tickets)

    run(test())


@pytest.mark.parametrize("seed", range(5))
def test_every_request_ends_and_leaves_nothing_behind(bundle: Path, seed: int) -> None:
    """Random requests, cancelled, expired, without time, with members that fail: each has its answers or an error."""

    async def test() -> None:
        draw = random.Random(seed)
        cluster = Cluster(bundle, max_queue=200, degrade=draw.random() < 0.5)
        for member in cluster.members:
            member.dies = lambda: draw.random() < 0.3
            member.refuses = lambda encoded: draw.random() < 0.05
        tickets: list[Ticket] = []
        waiting: list[tuple[Ticket, asyncio.Future[None]]] = []
        for _ in range(500):
            operation = draw.choice(["submit", "submit", "cancel", "expire", "yield", "yield"])
            if operation == "submit":
                deadline = monotonic() + draw.choice([-1, 0.001, 100])
                try:
                    waiting.append(cluster.start(draw.choices(TEXTS, k=draw.choice([1, 3, 30])), deadline=deadline))
                    tickets.append(waiting[-1][0])
                except Overloaded:
                    await asyncio.sleep(0.001)
            elif operation == "yield":
                await asyncio.sleep(0)
            elif waiting:
                ticket, _ = waiting.pop(draw.randrange(len(waiting)))
                getattr(cluster.batcher, operation)(ticket)
                assert ticket.finished
            assert 0 <= cluster.batcher._accepted <= 200
        await asyncio.gather(*(done for _, done in waiting))
        outcomes = {type(ticket.error) for ticket in tickets}
        assert outcomes == {type(None), CascadeError, InferenceError, DeadlineExceeded}
        assert all(ticket.error is not None or None not in ticket.answers for ticket in tickets)
        await cluster.close()

    run(test())
