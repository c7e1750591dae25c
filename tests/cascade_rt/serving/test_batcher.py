"""The batcher: the answers of `predict`, whatever runs together; order, limits, deadlines and errors."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from cascade_rt import CascadeError, CascadeRuntime, InferenceError, MaximumProbability, Prediction
from cascade_rt.engine.stage import Stage
from cascade_rt.serving.batcher import Answer, Batcher, DeadlineExceeded, Draining, Overloaded, Ticket
from cascade_rt.types import Text

from ...toy import WORDS
from .conftest import Gate

_DRAW = random.Random(0)
TEXTS = ["", *(" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(1, 60))) for _ in range(300))]


class Recorder:
    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.answers: list[Answer] = []

    def batch(self, stage: int, waits: Sequence[float], tokens: int, seconds: float) -> None:
        assert min(waits) >= 0
        assert seconds > 0
        self.batches.append((stage, len(waits), tokens))

    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)


@contextmanager
def batching(folder: Path, **settings: Any) -> Iterator[Batcher]:
    batcher = Batcher(CascadeRuntime(folder, threads=1, preload=True), **settings)
    try:
        yield batcher
    finally:
        batcher.close()


def submit(batcher: Batcher, texts: Sequence[Text], **settings: Any) -> tuple[Ticket, threading.Event]:
    done = threading.Event()
    encoded = batcher.runtime.plan.tokenizer.encode(texts)
    return batcher.submit(encoded, on_done=done.set, **settings), done


def answer(batcher: Batcher, texts: Sequence[Text], **settings: Any) -> list[Answer]:
    ticket, done = submit(batcher, texts, **settings)
    assert done.wait(timeout=30)
    return ticket.result()


def assert_same(found: Sequence[Prediction], expected: Sequence[Prediction]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert one._replace(score=0, probabilities=()) == other._replace(score=0, probabilities=())


@pytest.mark.parametrize("max_wait", [0.0, 0.005])
@pytest.mark.parametrize("fixture", ["bundle", "four_segments"])
def test_answers_are_those_of_predict(fixture: str, max_wait: float, request: pytest.FixtureRequest) -> None:
    """100 requests of all sizes from 8 threads at once."""
    folder: Path = request.getfixturevalue(fixture)
    draw = random.Random(1)
    requests = [draw.choices(TEXTS, k=draw.choice([1, 1, 1, 2, 5, 40])) for _ in range(100)]
    runtime = CascadeRuntime(folder, threads=1)
    expected = [runtime.predict(texts) for texts in requests]
    with batching(folder, max_wait=max_wait, max_queue=10_000) as batcher:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda texts: answer(batcher, texts), requests))
        exits = batcher.runtime.stats().exits
        assert batcher.queued() == [0] * len(exits)
    for one, other in zip(found, expected, strict=True):
        assert_same([answer.prediction for answer in one], other)
        assert not any(answer.degraded for answer in one)
    seen = [prediction.exit for predictions in expected for prediction in predictions]
    assert exits == [seen.count(exit) for exit in range(len(exits))]
    assert len(set(seen)) > 1


def test_pairs_and_thresholds_of_one_request(pair_bundle: Path) -> None:
    pairs: list[Text] = list(zip(TEXTS[:50], TEXTS[50:100], strict=True))
    runtime = CascadeRuntime(pair_bundle, threads=1)
    with batching(pair_bundle) as batcher:
        for thresholds in (0.0, 0.6, 1.0):
            other = runtime.with_thresholds(thresholds)
            assert_same(
                [found.prediction for found in answer(batcher, pairs, rule=other.exit_rule)], other.predict(pairs)
            )
        assert_same([found.prediction for found in answer(batcher, pairs)], runtime.predict(pairs))


def test_steps_and_logits(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    logits, _ = runtime.member_logits(TEXTS)
    with batching(bundle) as batcher:
        for row, found in enumerate(answer(batcher, TEXTS)):
            assert len(found.steps) == found.prediction.exit + 1
            assert found.steps[-1] == found.prediction.probabilities
            assert found.logits == pytest.approx(logits[found.prediction.exit, row].tolist(), abs=1e-4)


def test_a_request_without_texts_is_done_at_once(bundle: Path) -> None:
    with batching(bundle) as batcher:
        assert answer(batcher, []) == []


def test_remaining_texts_of_different_requests_run_together(bundle: Path, gate: Gate) -> None:
    """While one text is held back, 20 requests of one text each arrive: each member then runs once for all of them."""
    texts = [" ".join(words) for words in zip(*[iter(WORDS)] * 2, strict=False)][:20]
    exits = [found.exit for found in CascadeRuntime(bundle, threads=1).with_thresholds(1.0).predict(texts)]
    assert exits == [2] * 20
    never = CascadeRuntime(bundle, threads=1).with_thresholds(1.0).exit_rule
    at_once = CascadeRuntime(bundle, threads=1).with_thresholds(0.0).exit_rule
    with batching(bundle, max_wait=60.0) as batcher:
        gate.close()
        _, first = submit(batcher, ["the film"], rule=at_once)
        gate.entered = threading.Semaphore(0)
        while not gate.runs:
            gate.wait_for_run()
        others = [submit(batcher, [text], rule=never)[1] for text in texts]
        gate.opened.set()
        assert all(done.wait(timeout=30) for done in [first, *others])
    assert gate.runs == [("tiny", 1), ("tiny", 20), ("small", 20), ("big", 20)]


def test_the_text_that_arrived_first_goes_first_with_others_of_its_length(bundle: Path, gate: Gate) -> None:
    long, short = " ".join(["film"] * 55), "the film"
    with batching(bundle, max_queue=10_000) as batcher:
        at_once = batcher.runtime.with_thresholds(0.0).exit_rule
        order: list[str] = []
        gate.close()
        submit(batcher, [short])
        while not gate.runs:
            gate.wait_for_run()
        dones = []
        for name, text in [("long", long), *[("short", short)] * 100, *[("long", long)] * 3]:
            done = threading.Event()

            def note(name: str = name, done: threading.Event = done) -> None:
                order.append(name)
                done.set()

            batcher.submit(batcher.runtime.plan.tokenizer.encode([text]), rule=at_once, on_done=note)
            dones.append(done)
        gate.opened.set()
        assert all(done.wait(timeout=30) for done in dones)
    assert order[:4] == ["long"] * 4, "one came first, three came last, and they are alike"
    tiny = [count for name, count in gate.runs if name == "tiny"]
    assert tiny[1] == 4
    assert max(tiny) <= 512 // 4, "no micro-batch is over the budget of padded tokens"


def test_full_queues_refuse_at_once_and_take_texts_again(bundle: Path, gate: Gate) -> None:
    with batching(bundle, max_queue=10) as batcher:
        gate.close()
        _, first = submit(batcher, TEXTS[:8])
        with pytest.raises(Overloaded, match="try again in") as raised:
            submit(batcher, TEXTS[:3])
        assert raised.value.retry_after >= 1
        _, second = submit(batcher, TEXTS[:2])
        gate.opened.set()
        assert first.wait(timeout=30)
        assert second.wait(timeout=30)
        assert len(answer(batcher, TEXTS[:40])) == 40, "one request is never refused by an idle server"


def test_a_cancelled_request_leaves_the_queue(bundle: Path, gate: Gate) -> None:
    with batching(bundle, max_queue=60) as batcher:
        gate.close()
        _, first = submit(batcher, ["the film"])
        while not gate.runs:
            gate.wait_for_run()
        ticket, done = submit(batcher, TEXTS[:50])
        assert batcher.queued()[0] == 50
        batcher.cancel(ticket)
        assert batcher.queued()[0] == 0
        _, third = submit(batcher, TEXTS[:50])  # there is room again
        gate.opened.set()
        assert first.wait(timeout=30)
        assert third.wait(timeout=30)
        assert not done.is_set(), "nobody waits for it"
        batcher.cancel(ticket)
    assert sum(count for name, count in gate.runs if name == "tiny") == 51


def test_a_deadline_that_passes_in_the_queue(bundle: Path, gate: Gate) -> None:
    with batching(bundle) as batcher:
        gate.close()
        _, first = submit(batcher, ["the film"])
        while not gate.runs:
            gate.wait_for_run()
        late, late_done = submit(batcher, TEXTS[:5], deadline=monotonic() - 1)
        in_time, in_time_done = submit(batcher, TEXTS[:5], deadline=monotonic() + 100)
        gate.opened.set()
        assert all(done.wait(timeout=30) for done in (first, late_done, in_time_done))
        with pytest.raises(DeadlineExceeded):
            late.result()
        assert len(in_time.result()) == 5


@pytest.mark.parametrize("degrade", [True, False])
def test_a_text_without_time_for_the_next_member(bundle: Path, degrade: bool) -> None:
    """The pace of the last member says that it takes an hour: what gets there in time for the others is degraded."""
    expected = CascadeRuntime(bundle, threads=1).with_members(["tiny", "small"]).predict(TEXTS)
    with batching(bundle, degrade=degrade) as batcher:
        batcher._seconds_per_token[2] = 3600.0
        if not degrade:
            with pytest.raises(DeadlineExceeded):
                answer(batcher, TEXTS, deadline=monotonic() + 600)
            return
        found = answer(batcher, TEXTS, deadline=monotonic() + 600)
        assert_same([one.prediction for one in found], expected)
        limit = batcher.runtime.thresholds[1]
        assert [one.degraded for one in found] == [
            one.prediction.exit == 1 and one.prediction.score <= limit for one in found
        ]
        assert 0 < sum(one.degraded for one in found) < len(found)
        assert sum(batcher.runtime.stats().exits) == len(TEXTS)


def test_one_slow_run_does_not_refuse_texts_for_good(bundle: Path) -> None:
    with batching(bundle) as batcher:
        batcher._seconds_per_token[0] = 0.1  # seconds for one text, measured in a bad moment
        refused = 0
        while True:
            try:
                assert len(answer(batcher, ["the film"], deadline=monotonic() + 0.1)) == 1
                break
            except DeadlineExceeded:
                refused += 1
        assert 0 < refused < 50


def test_expire_answers_with_what_is_there(bundle: Path, gate: Gate) -> None:
    with batching(bundle, degrade=True) as batcher:
        never = batcher.runtime.with_thresholds(1.0).exit_rule
        gate.close()
        ticket, done = submit(batcher, ["the film"], rule=never)
        gate.wait_for_run()
        batcher.expire(ticket)
        with pytest.raises(DeadlineExceeded):
            ticket.result()
        gate.opened.set()
        later, _ = submit(batcher, ["the film"], rule=never)
        while ("small", 1) not in gate.runs:
            gate.wait_for_run()
        gate.close()
        batcher.expire(later)
        if not later.error:
            (found,) = later.result()
            assert found.degraded is (found.prediction.exit < 2)
        gate.opened.set()
        batcher.expire(later)
        assert not done.is_set()


def test_an_error_reaches_only_the_request_that_it_is_from(
    bundle: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = "cat " * 7
    run = Stage.run

    def failing(stage: Stage, batch: Any) -> Any:
        ids = batch["input_ids"]
        if stage.entry.name == "small" and any(len(set(row.tolist())) <= 4 and len(row) > 5 for row in ids):
            raise InferenceError("member 'small' answered NaN or infinity")
        return run(stage, batch)

    monkeypatch.setattr(Stage, "run", failing)
    with batching(bundle) as batcher:
        never = batcher.runtime.with_thresholds(1.0).exit_rule
        gate.close()
        _, first = submit(batcher, ["the film"])
        while not gate.runs:
            gate.wait_for_run()
        bad, bad_done = submit(batcher, [poison, poison], rule=never)
        good = [submit(batcher, ["the film was not very good and dull"], rule=never) for _ in range(5)]
        gate.opened.set()
        assert all(done.wait(timeout=30) for done in [first, bad_done, *(done for _, done in good)])
        with pytest.raises(InferenceError, match="NaN"):
            bad.result()
        for ticket, _ in good:
            assert len(ticket.result()) == 1
        assert len(answer(batcher, TEXTS[:20])) == 20, "the thread still works"


def test_close_answers_what_was_accepted_and_refuses_the_rest(bundle: Path) -> None:
    batcher = Batcher(CascadeRuntime(bundle, threads=1, preload=True))
    tickets = [submit(batcher, TEXTS[:50]) for _ in range(5)]
    encoded = batcher.runtime.plan.tokenizer.encode(["the film"])
    batcher.close()
    assert all(ticket.finished and done.is_set() for ticket, done in tickets)
    with pytest.raises(Draining):
        batcher.submit(encoded)


def test_the_observer_sees_every_batch_and_answer(bundle: Path) -> None:
    recorder = Recorder()
    with batching(bundle, observer=recorder) as batcher:
        answers = answer(batcher, TEXTS)
        executed = [sum(found.prediction.exit >= stage for found in answers) for stage in range(3)]
        assert [sum(texts for at, texts, _ in recorder.batches if at == stage) for stage in range(3)] == executed
        assert sorted(map(id, recorder.answers)) == sorted(map(id, answers))
        assert all(tokens <= 512 for _, _, tokens in recorder.batches)


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_and_leaves_nothing_behind(bundle: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random requests, cancelled, expired, without time, of which some fail: each has its answers or an error."""
    draw = random.Random(seed)
    fails, run = random.Random(seed), Stage.run

    def failing(stage: Stage, batch: Any) -> Any:
        if fails.random() < 0.05:
            raise InferenceError("the member answered NaN")
        return run(stage, batch)

    with batching(bundle, max_queue=200, degrade=seed % 2 == 0) as batcher:
        monkeypatch.setattr(Stage, "run", failing)
        tickets, waiting = list[Ticket](), list[tuple[Ticket, threading.Event]]()
        for _ in range(300):
            operation = draw.choice(["submit", "submit", "cancel", "expire", "wait", "wait"])
            if operation == "submit":
                deadline = monotonic() + draw.choice([-1, 0.001, 100])
                with suppress(Overloaded):
                    waiting.append(submit(batcher, draw.choices(TEXTS, k=draw.choice([1, 3, 30])), deadline=deadline))
                    tickets.append(waiting[-1][0])
            elif waiting:
                ticket, done = waiting.pop(draw.randrange(len(waiting)))
                if operation == "wait":
                    assert done.wait(timeout=30)
                else:
                    getattr(batcher, operation)(ticket)
                assert ticket.finished
            assert 0 <= batcher._accepted <= 200
        assert all(done.wait(timeout=30) for _, done in waiting)
        assert {type(ticket.error) for ticket in tickets} == {
            type(None),
            CascadeError,
            InferenceError,
            DeadlineExceeded,
        }
        assert all(ticket.error is not None or None not in ticket.answers for ticket in tickets)
        assert batcher._accepted == 0
        assert batcher.queued() == [0, 0, 0]


def start(batcher: Batcher, text: str, **settings: Any) -> Ticket:
    """Start one text from a coroutine, and wait for its answer."""

    async def started() -> Ticket:
        ticket, done = batcher.start(batcher.runtime.plan.encode([text]), **settings)
        await asyncio.wait_for(done, 30)
        return ticket

    return asyncio.run(started())


def test_a_member_without_layers_answers_one_text_in_the_callers_thread(with_bag: Path) -> None:
    """Texts that go on are answered by the batcher's thread, as if all had been there."""
    recorder, texts = Recorder(), TEXTS[:80]
    alone = CascadeRuntime(with_bag, threads=1)
    expected = [alone.predict([text])[0] for text in texts]
    with batching(with_bag, observer=recorder) as batcher:
        tickets = [start(batcher, text) for text in texts]
        found = [ticket.result()[0] for ticket in tickets]
        assert [one.prediction for one in found] == expected
        assert [len(one.steps) for one in found] == [one.exit + 1 for one in expected]
        assert [len(ticket.runs) for ticket in tickets] == [one.exit + 1 for one in expected]
        assert batcher.runtime.stats().exits == [sum(one.exit == exit for one in expected) for exit in range(4)]
        assert batcher.runtime.stats().from_words == len(texts)
        assert [answer.prediction for answer in recorder.answers] == expected
        assert sum(stage == 0 for stage, _, _ in recorder.batches) == len(texts)
        assert start(batcher, texts[1], rule=batcher.runtime.with_thresholds(0.0).exit_rule).result()[0].steps[1:] == ()


def test_an_error_of_a_member_without_layers_reaches_its_request(
    with_bag: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with batching(with_bag) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "run", lambda *_: (_ for _ in ()).throw(ValueError("odd")))
            ticket = start(batcher, "a film")
        with pytest.raises(InferenceError, match="odd"):
            ticket.result()
        assert start(batcher, "a film").result()
        assert batcher._accepted == 0


def test_a_text_that_goes_on_while_the_batcher_closes_is_answered(with_bag: Path, gate: Gate) -> None:
    """Its first member runs in the caller's thread, so for the batcher's nothing is there."""
    alone = CascadeRuntime(with_bag, threads=1, thresholds=1.0)
    batcher = Batcher(alone.with_thresholds(1.0), max_queue=10)
    expected = alone.predict(["a film"])[0]
    gate.close()
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(start, batcher, "a film")
        gate.wait_for_run()
        closing = pool.submit(batcher.close)
        while not batcher._draining:
            sleep(0.001)
        gate.opened.set()
        assert found.result(30).result()[0].prediction == expected
        closing.result(30)


def test_a_rule_that_fails_leaves_no_text_behind(with_bag: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with batching(with_bag) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(MaximumProbability, "leaves_alone", lambda *_: 1 / 0)
            ticket = start(batcher, "a film")
        with pytest.raises(InferenceError, match="division by zero"):
            ticket.result()
        assert (batcher._accepted, batcher._started) == (0, 0)


def test_after_its_deadline_no_text_is_run(with_bag: Path) -> None:
    with batching(with_bag) as batcher, pytest.raises(DeadlineExceeded):
        start(batcher, "a film", deadline=monotonic() - 1).result()
