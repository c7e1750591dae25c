"""The interface of Text Embeddings Inference for classifiers: /predict and /info."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, StrictBool
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from ..types import Text
from .batcher import Answer
from .json_body import BATCH, LIST, ONE, ONE_LIST_OR_BATCH, JSONRoute
from .models import Model
from .responses import ERRORS, JSON, ranked
from .service import BadField, Service


def _one_or_two(found: Any) -> Any:
    if isinstance(found, list) and not 1 <= len(found) <= 2:
        message = 'found a list of {count}, expected ["a"] or a pair ["a", "b"]; a batch is [["a"], ["b"]]'
        raise PydanticCustomError("length", message, {"count": len(found)})
    return found


Row = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=2), BeforeValidator(_one_or_two)]


class PredictRequest(BaseModel):
    """A text, a pair, or a batch of both. Other fields are ignored, as by TEI."""

    inputs: Annotated[
        Annotated[str, ONE] | Annotated[Row, LIST] | Annotated[list[Row], Field(fail_fast=True, min_length=1), BATCH],
        ONE_LIST_OR_BATCH,
    ] = Field(description='A text; a pair ["a", "b"]; or a batch [["a"], ["a", "b"]].')
    raw_scores: StrictBool | None = Field(False, description="Return logits instead of probabilities.")
    truncate: StrictBool | None = Field(
        None, description="false refuses texts that are too long; the default cuts them."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = Field(
        None, description="Has to be the bundle's own."
    )


class Score(BaseModel):
    """A label and its probability or logit."""

    score: float
    label: str


def tei_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["text-embeddings-inference"], route_class=JSONRoute)

    @router.post("/", summary="As /predict", response_model=list[Score] | list[list[Score]], responses=ERRORS)
    @router.post(
        "/predict",
        summary="Classify a text, a pair or a batch",
        response_model=list[Score] | list[list[Score]],
        responses=ERRORS,
    )
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Answer all labels, the most probable first: one list for a text or pair, a list of lists for a batch."""
        model = service.models.get()
        _check_direction(model, body.truncation_direction)
        batch = isinstance(body.inputs, list) and isinstance(body.inputs[0], list)
        inputs: list[Any] = list(body.inputs) if batch else [body.inputs]
        texts = [_text(found) for found in inputs]
        if not batch and isinstance(texts[0], tuple) and not model.runtime.bundle.pair:
            raise BadField("inputs", body.inputs, 'one text, as this bundle takes no pairs; a batch is [["a"], ["b"]]')
        model, answers = await service.classify(request, None, texts, truncate=body.truncate is not False)
        rows = [_scores(model, answer, bool(body.raw_scores)) for answer in answers]
        return JSON(rows if batch else rows[0])

    @router.get("/info", summary="What is served")
    async def info() -> dict[str, Any]:
        """Describe the first bundle."""
        return describe(service, service.models.get())

    return router


def describe(service: Service, model: Model) -> dict[str, Any]:
    """Return what TEI says of a classifier, and the members of the cascade."""
    bundle = model.runtime.bundle
    names = {str(index): label for index, label in enumerate(bundle.labels)}
    return {
        "model_id": model.name,
        "model_sha": bundle.sha256,
        "model_dtype": bundle.members[-1].precision,
        "model_type": {"classifier": {"id2label": names, "label2id": {label: int(at) for at, label in names.items()}}},
        "max_input_length": bundle.max_length,
        "max_client_batch_size": service.settings.max_texts,
        "max_concurrent_requests": service.settings.max_queue,
        "max_batch_tokens": max(stage.budget for stage in model.runtime.plan.stages),
        "auto_truncate": True,
        "version": __version__,
        "loaded": model.loaded,
        "pair": bundle.pair,
        "task": bundle.task,
        "exit_rule": model.runtime.exit_rule.kind,
        "thresholds": model.runtime.thresholds,
        "members": [
            {"name": member.name, "layers": member.layers, "precision": member.precision} for member in bundle.members
        ],
    }


def _text(found: str | list[str]) -> Text:
    if isinstance(found, str):
        return found
    return found[0] if len(found) == 1 else (found[0], found[1])


def _scores(model: Model, answer: Answer, raw: bool) -> list[dict[str, Any]]:
    return ranked(model.runtime.bundle.labels, answer.logits if raw else answer.prediction.probabilities)


def _check_direction(model: Model, wanted: str | None) -> None:
    own = "Left" if model.runtime.plan.tokenizer.cuts_left else "Right"
    if wanted is not None and wanted.title() != own:
        raise BadField("truncation_direction", wanted, f"{own}: the bundle's own")
