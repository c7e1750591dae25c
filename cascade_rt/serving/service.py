"""From the texts of a request to their answers, whatever the interface."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import Gauge
from starlette.requests import Request

from ..engine.adapted import followed
from ..engine.execution import Execution
from ..engine.exit_rules import ExitRule
from ..engine.tokenization import Encoded
from ..errors import CascadeError, InvalidOption
from ..runtime import CascadeRuntime
from ..types import Text
from .batcher import Answer, Batcher, Draining
from .metrics import Measured, Metrics
from .models import Identify, Model, Models, identity
from .settings import Settings

if TYPE_CHECKING:  # of an extra
    from .tracing import Tracing

_INLINE = 20_000  # characters that are tokenized without another thread, which takes longer than they do
_SPIN_US = 50  # with the default, an idle member keeps a core for half a millisecond that the response needs
_DRIFT_SECONDS = 5.0
LONGEST_DEADLINE = 86_400_000  # milliseconds
_UNWATCHED = 0.05  # seconds before the server looks whether a client is still there
_log = logging.getLogger(__name__)


class BadField(InvalidOption):
    """A field, header or path of a request has a value that cannot be used."""


class TooManyTexts(CascadeError):
    """A request has more texts than are allowed."""


OpenRuntime = Callable[[str, Execution], CascadeRuntime]
"""Opens the bundle of a source."""


def open_runtime(source: str, execution: Execution) -> CascadeRuntime:
    """Open the bundle of a folder, or of "hf:org/name", with the settings that were measured here, if any."""
    found = followed(source, replace(execution, spin_us=None))
    spin_us = execution.spin_us if found.spin_us is None else found.spin_us
    return CascadeRuntime(source, **replace(found, spin_us=spin_us).arguments())


class Service:
    """The part of a server that all interfaces share."""

    def __init__(
        self,
        sources: dict[str, str],
        settings: Settings,
        tracing: Tracing | None = None,
        open_runtime: OpenRuntime = open_runtime,
        identify: Identify = identity,
    ) -> None:
        """Open the bundles; `sources`: folder, or "hf:org/name", by name. `identify`: tells a replaced bundle."""
        self.settings = settings
        self.tracing = tracing
        self.metrics = Metrics()
        self.draining = False
        self.measure: Callable[[], Awaitable[Measured]] = self.measured
        """Returns the metrics of all that serve together; a replica asks the others too."""
        self._open_runtime = open_runtime
        self._tokenizing = asyncio.Semaphore(1)
        self._drifts: dict[str, tuple[float, float | None]] = {}
        self._gauges: set[tuple[Gauge, tuple[str, ...]]] = set()  # all that were ever set, by their labels
        self.models = Models(sources, self._open, self._batcher, self.metrics, identify)

    def _open(self, name: str, source: str) -> CascadeRuntime:
        """Load all members, and run each once: a first run takes longer."""
        settings = self.settings
        runtime = self._open_runtime(source, replace(settings.execution, spin_us=_SPIN_US))
        runtime = runtime.with_stride(settings.stride, settings.aggregate)
        runtime.member_logits([("a", "a") if runtime.bundle.pair else "a"])
        return runtime

    def _batcher(self, name: str, runtime: CascadeRuntime) -> Batcher:
        settings = self.settings
        return Batcher(
            runtime,
            max_wait=settings.max_wait_ms / 1000,
            max_queue=settings.max_queue,
            degrade=settings.degrade,
            observer=self.metrics.observer(name, [member.name for member in runtime.bundle.members]),
        )

    async def classify(
        self,
        request: Request,
        name: str | None,
        texts: Sequence[Text],
        *,
        thresholds: float | Sequence[float] | None = None,
        truncate: bool = True,
    ) -> tuple[Model, list[Answer]]:
        """Answer the texts of a request; raises the errors of `CascadeRuntime.predict` and of `Batcher.submit`.

        `name`: of the model, None for the first. `thresholds`: for this request alone. `truncate=False` refuses texts
        that are too long. A client that hangs up ends it with `ClientGone`.
        """
        if len(texts) > self.settings.max_texts:
            raise TooManyTexts(
                f"found {len(texts):,} texts, expected at most {self.settings.max_texts:,}; send several requests"
            )
        deadline = deadline_of(request, self.settings.timeout)
        while True:
            model = self.models.get(name)
            with suppress(Draining):  # replaced in this very moment: the new one answers
                answers = await self._answered(request, model, texts, thresholds, truncate, deadline)
                if self.settings.log_texts:
                    _log_answers(request, model, texts, answers)
                return model, answers
            self.check_taking()

    def check_taking(self) -> None:
        """Raise Draining if the server stops."""
        if self.draining:
            raise Draining("the server is stopping; try another one")

    async def _answered(
        self,
        request: Request,
        model: Model,
        texts: Sequence[Text],
        thresholds: float | Sequence[float] | None,
        truncate: bool,
        deadline: float,
    ) -> list[Answer]:
        rule = None if thresholds is None else self._rule(model, thresholds)
        plan = model.runtime.plan
        short = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts) <= _INLINE
        model.batcher.check_room(len(texts))
        started = monotonic()
        if short:
            encoded = plan.encode(texts)
        else:
            async with self._tokenizing:  # one at a time: long texts take much memory meanwhile
                encoded = await asyncio.to_thread(plan.encode, texts)
        if not truncate:
            _refuse_long(encoded, plan.bundle.max_length)
        if encoded.counts is not None and (rows := int(encoded.counts.sum())) > self.settings.max_texts:
            raise TooManyTexts(
                f"found texts of {rows:,} windows, which count as texts, expected at most "
                f"{self.settings.max_texts:,}; send several requests, or shorter texts"
            )
        tokenization = started, monotonic()
        ticket, done = model.batcher.start(encoded, rule=rule, deadline=deadline)
        try:
            await _finished(request, done, deadline)
        except BaseException:
            model.batcher.cancel(ticket)
            raise
        finally:
            if self.tracing is not None:
                members = [member.name for member in model.runtime.bundle.members]
                self.tracing.record(model.name, members, tokenization, ticket.runs)
        model.batcher.expire(ticket)  # does nothing to a ticket that is finished
        return ticket.result()

    def _rule(self, model: Model, thresholds: float | Sequence[float]) -> ExitRule:
        if not self.settings.allow_thresholds:
            raise InvalidOption("thresholds", thresholds, "none: this server was started without --allow-thresholds")
        return model.runtime.with_thresholds(thresholds).exit_rule

    def drift(self, model: Model) -> float | None:
        """Return the p-value of `stats`, some seconds old: it takes milliseconds to compute."""
        until, value = self._drifts.get(model.name, (0.0, None))
        if monotonic() >= until:
            value = model.runtime.stats().p_value
            self._drifts[model.name] = monotonic() + _DRIFT_SECONDS, value
        return value

    async def measured(self) -> Measured:
        """Return the metrics of this server."""
        self.update_gauges()
        return self.metrics.measured()

    def update_gauges(self) -> None:
        """Set the metrics that say how things are now."""
        metrics = self.metrics
        values: dict[tuple[Gauge, tuple[str, ...]], float] = {}
        for model in self.models:
            values[metrics.bundles, (model.name, model.version)] = 1
            for member, count in zip(model.runtime.bundle.members, model.batcher.queued(), strict=True):
                values[metrics.queued, (model.name, member.name)] = count
            drift = self.drift(model)
            values[metrics.drift, (model.name,)] = math.nan if drift is None else drift
        for gauge, labels in self._gauges - values.keys():  # of bundles that were replaced
            gauge.labels(*labels).set(0)
        for (gauge, labels), value in values.items():
            gauge.labels(*labels).set(value)
        self._gauges |= values.keys()

    def close(self) -> None:
        """Answer what was accepted, then release all sessions."""
        self.draining = True
        self.models.close()
        if self.tracing is not None:
            self.tracing.close()


class ClientGone(CascadeError):
    """The client hung up before its answer."""


def _log_answers(request: Request, model: Model, texts: Sequence[Text], answers: Sequence[Answer]) -> None:
    found = [answer.prediction for answer in answers]
    _log.info(
        "answers",
        extra={
            "request_id": request.scope["log"]["request_id"],
            "model": model.name,
            "version": model.version,
            "texts": list(texts),
            "labels": [list(one.labels) if model.runtime.task.several else one.label for one in found],
            "scores": [one.score for one in found],
            "exits": [one.exit for one in found],
        },
    )


def whole_number(header: str) -> bool:
    """Return whether a header is a whole number of at most 12 digits."""
    return header.isascii() and header.isdigit() and len(header) <= 12


def deadline_of(request: Request, timeout: float) -> float:
    """Return when a request must be answered, by the clock `time.monotonic`; raise InvalidOption for a bad header."""
    header = request.headers.get("x-deadline-ms")
    if header is None:
        return monotonic() + timeout
    if not whole_number(header) or not 0 < int(header) <= LONGEST_DEADLINE:
        raise BadField("X-Deadline-Ms", header, "milliseconds, a whole number from 1 to 86400000")
    return monotonic() + int(header) / 1000


async def _finished(request: Request, done: asyncio.Future[None], deadline: float) -> None:
    """Wait until a ticket is finished or its deadline has passed; raise ClientGone if the client hangs up before."""
    if done.done():
        return
    remaining = deadline - monotonic()
    await asyncio.wait([done], timeout=min(_UNWATCHED, max(0.0, remaining)))
    if done.done() or remaining <= _UNWATCHED:
        return
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([done, gone], timeout=max(0.0, deadline - monotonic()), return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not done.done():
            raise ClientGone("the client hung up")
    finally:
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_long(encoded: Encoded, most: int) -> None:
    for row in range(len(encoded)):
        if encoded.truncated(row):
            raise BadField("truncate", False, f"true: text {row} has more than {most} tokens")
