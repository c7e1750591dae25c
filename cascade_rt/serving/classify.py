"""Our own interface: everything that a cascade knows about an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..errors import CascadeError, TextError
from ..types import Text
from .batcher import Answer, Overloaded
from .json_body import LIST, ONE, ONE_OR_LIST, JSONRoute
from .models import Model
from .responses import ERRORS, JSON, describe_error, dumps
from .service import Service, TooManyTexts

NDJSON = "application/x-ndjson"
_STREAMED = 64  # texts that a stream queues at a time
_PAUSE = 0.05  # seconds before a stream tries again while the queues are full

Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
TextOrPair = Annotated[Annotated[str, ONE] | Annotated[tuple[str, str], LIST], ONE_OR_LIST]
Thresholds = Annotated[
    Annotated[Probability, ONE] | Annotated[list[Probability], Field(fail_fast=True), LIST], ONE_OR_LIST
]


class ClassifyRequest(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[TextOrPair], Field(fail_fast=True)] = Field(
        description="Texts, or pairs for a bundle on pairs.", min_length=1
    )
    model: str | None = Field(None, description="Name of the bundle; the first one without it.")
    thresholds: Thresholds | None = Field(
        None, description="One for all members, or one per member but the last; needs --allow-thresholds."
    )
    steps: StrictBool | None = Field(False, description="Also return the probabilities of every member that ran.")


class Classified(BaseModel):
    """The answer to one text."""

    label: str
    score: float = Field(description="Probability of the label.")
    probabilities: dict[str, float] = Field(description="Of all labels.")
    exit: int = Field(description="Which member answered, from 0.")
    member: str = Field(description="Its name.")
    layers: int = Field(description="Encoder layers executed, by all members that the text ran.")
    truncated: bool = Field(description="Whether the text was longer than max_length tokens.")
    labels: list[str] | None = Field(
        None, description="Of bundles with several labels per text: all that are above their cut."
    )
    degraded: bool = Field(description="Whether a deadline kept it from the next member.")
    steps: list[dict[str, float]] | None = Field(None, description="Probabilities by member, where asked for.")


class ClassifyResponse(BaseModel):
    """The answers, in the order of the texts."""

    model: str
    version: str = Field(description="The first 12 digits of the bundle's sha256.")
    predictions: list[Classified]


class ServedMember(BaseModel):
    """A member of a bundle."""

    name: str
    layers: int
    precision: str


class ServedModel(BaseModel):
    """A bundle, and what was answered under its name since the server started."""

    name: str
    version: str
    labels: list[str]
    task: str = Field(description="single_label or multi_label.")
    pair: bool
    members: list[ServedMember]
    thresholds: list[float]
    stride: int | None = Field(description="Tokens that the windows of a long text share; null if it is cut.")
    aggregate: str | None = Field(description="How windows become one answer: mean or max.")
    allow_thresholds: bool = Field(description="Whether requests may name thresholds.")
    texts: int = Field(description="Texts answered.")
    exits: list[int] = Field(description="Texts answered by each member.")
    queued: list[int] = Field(description="Texts that wait for each member, in the process that answers this.")
    p_value: float | None = Field(description="Of the difference between the exits of this process and of tuning.")


class ModelsResponse(BaseModel):
    """All bundles of the server."""

    models: list[ServedModel]
    requests: int = Field(description="Requests answered.")
    seconds: float = Field(description="Time of these requests, together.")


def classify_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["classify"], route_class=JSONRoute)

    @router.post(
        "/v1/classify",
        summary="Classify texts",
        response_model=ClassifyResponse,
        responses=ERRORS | {200: {"content": {NDJSON: {"schema": {"type": "string"}}}}},
    )
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Answer in one JSON object, or with `Accept: application/x-ndjson` in one line per text, as they come.

        A stream takes any number of texts that fit into the body, and waits while the queues are full. An error that
        comes after its first line is its last line.
        """
        if NDJSON in request.headers.get("accept", ""):
            lines = _lines(service, body, request)
            first = await anext(lines)  # an error before the first line is an error of the request
            joined = _joined(first, lines)
            if request.scope["http_version"] == "1.0":  # which has no chunks
                return Response(b"".join([line async for line in joined]), media_type=NDJSON)
            return StreamingResponse(joined, media_type=NDJSON)
        model, answers = await service.classify(request, body.model, body.texts, thresholds=body.thresholds)
        rows = list(_described(model, answers, bool(body.steps)))
        return JSON({"model": model.name, "version": model.version, "predictions": rows})

    @router.get("/v1/models", summary="What is served", response_model=ModelsResponse)
    async def models() -> Response:
        """Describe the bundles and what they have answered."""
        requests, seconds, texts = (await service.measure()).answered()
        found = [_served(service, model, texts).model_dump() for model in service.models]
        return JSON({"models": found, "requests": requests, "seconds": seconds})

    return router


def _served(service: Service, model: Model, texts: Mapping[tuple[str, str], int]) -> ServedModel:
    bundle, windows = model.runtime.bundle, model.runtime.plan.windows
    exits = [texts.get((model.name, member.name), 0) for member in bundle.members]
    return ServedModel(
        name=model.name,
        version=model.version,
        labels=list(bundle.labels),
        task=bundle.task,
        pair=bundle.pair,
        members=[ServedMember(name=one.name, layers=one.layers, precision=one.precision) for one in bundle.members],
        thresholds=model.runtime.thresholds,
        stride=None if windows is None else windows.stride,
        aggregate=None if windows is None else windows.aggregate,
        allow_thresholds=service.settings.allow_thresholds and bool(model.runtime.thresholds),
        texts=sum(exits),
        exits=exits,
        queued=model.batcher.queued(),
        p_value=service.drift(model),
    )


def _described(model: Model, answers: list[Answer], steps: bool) -> Iterator[dict[str, Any]]:
    labels, members = model.runtime.bundle.labels, model.runtime.bundle.members
    for answer in answers:
        found = answer.prediction
        row = found._asdict() | {
            "probabilities": dict(zip(labels, found.probabilities, strict=True)),
            "member": members[found.exit].name,
            "degraded": answer.degraded,
        }
        if not model.runtime.task.several:
            del row["labels"]
        if steps:
            row["steps"] = [dict(zip(labels, step, strict=True)) for step in answer.steps]
        yield row


async def _lines(service: Service, body: ClassifyRequest, request: Request) -> AsyncIterator[bytes]:
    """Yield one line per text, some texts at a time."""
    size = min(_STREAMED, service.settings.max_texts)
    texts: Sequence[Text] = body.texts
    start = 0
    while start < len(texts):
        while True:
            try:
                some = texts[start : start + size]
                model, answers = await service.classify(request, body.model, some, thresholds=body.thresholds)
                break
            except TextError as error:
                raise TextError(start + error.index, error.reason) from error
            except TooManyTexts:  # by their windows
                if len(some) == 1:
                    raise
                size = len(some) // 2
                continue
            except Overloaded:
                if not start:
                    raise
            await asyncio.sleep(_PAUSE)
        await asyncio.sleep(0)  # a member without layers has answered in this thread: others get their turn
        for row in _described(model, answers, bool(body.steps)):
            yield dumps(row | {"model": model.name, "version": model.version}) + b"\n"
        start += len(some)


async def _joined(first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for line in lines:
            yield line
    except CascadeError as error:
        _, found = describe_error(error)
        yield dumps(found.model_dump(exclude_none=True)) + b"\n"
