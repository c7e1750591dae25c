"""The interface of Hugging Face's Inference Endpoints for text classification, which `InferenceClient` speaks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from starlette.requests import Request
from starlette.responses import Response

from .json_body import LIST, ONE, ONE_OR_LIST, JSONRoute
from .responses import ERRORS, JSON, ranked
from .service import BadField, Service
from .tei import Score


def _lower(found: Any) -> Any:
    return found.lower() if isinstance(found, str) else found


class Parameters(BaseModel):
    """Parameters of an answer. Others are refused, as by pipelines."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="Only the most probable labels.")
    return_all_scores: StrictBool | None = Field(None, description="Without top_k, false is top_k 1.")
    function_to_apply: Annotated[Literal["softmax", "sigmoid", "none"] | None, BeforeValidator(_lower)] = Field(
        None, description="none for logits; for probabilities, the default, the bundle's own: softmax or sigmoid."
    )
    truncation: Literal[True, False, "longest_first", "only_first", "do_not_truncate"] | None = Field(
        None, description="false refuses texts that are too long; the default cuts them."
    )
    max_length: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="At least the bundle's own, where texts are cut."
    )
    padding: Literal[True, False, "longest", "max_length", "do_not_pad"] | None = Field(
        None, description="Changes no answer."
    )


class InferenceRequest(BaseModel):
    """A text or several. Other fields are ignored, as by Inference Endpoints."""

    inputs: Annotated[
        Annotated[str, ONE] | Annotated[list[str], Field(fail_fast=True, min_length=1), LIST], ONE_OR_LIST
    ]
    parameters: Parameters | None = None


def hugging_face_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["hugging-face"], route_class=JSONRoute)

    @router.post(
        "/models/{name}",
        summary="Classify as Hugging Face's Inference Endpoints do",
        response_model=list[list[Score]],
        responses=ERRORS,
    )
    async def infer(name: str, body: InferenceRequest, request: Request) -> Response:
        """Answer a list of labels, the most probable first, for each text; also for a single one."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        wanted = body.parameters or Parameters.model_validate({})
        own = service.models.get(name).runtime.bundle.max_length
        if wanted.max_length is not None and wanted.max_length < own:
            raise BadField("parameters.max_length", wanted.max_length, f"at least {own}, where the bundle cuts texts")
        function = service.models.get(name).runtime.task.function
        if wanted.function_to_apply not in (None, "none", function):
            expected = f"{function} or none, for this bundle's labels"
            raise BadField("parameters.function_to_apply", wanted.function_to_apply, expected)
        truncate = wanted.truncation not in (False, "do_not_truncate")
        model, answers = await service.classify(request, name, texts, truncate=truncate)
        labels, raw = model.runtime.bundle.labels, wanted.function_to_apply == "none"
        most = 1 if wanted.top_k is None and wanted.return_all_scores is False else wanted.top_k
        rows = [ranked(labels, answer.logits if raw else answer.prediction.probabilities) for answer in answers]
        return JSON([row[:most] for row in rows])

    return router
