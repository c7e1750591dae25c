"""The interface of Hugging Face's Inference Endpoints for text classification, which `InferenceClient` speaks."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from .responses import ERRORS, JSON, ranked
from .service import Service
from .tei import Score


class Parameters(BaseModel):
    """How to present the answers."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="Only the most probable labels.")
    function_to_apply: Literal["softmax", "none"] | None = Field(
        None, description="softmax for probabilities, the default; none for logits."
    )


class InferenceRequest(BaseModel):
    """A text or several."""

    model_config = ConfigDict(extra="forbid")

    inputs: str | Annotated[list[str], Field(fail_fast=True, min_length=1)]
    parameters: Parameters | None = None


def hugging_face_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["hugging-face"])

    @router.post(
        "/models/{name}",
        summary="Classify as Hugging Face's Inference Endpoints do",
        response_model=list[list[Score]],
        responses=ERRORS,
    )
    async def infer(name: str, body: InferenceRequest, request: Request) -> Response:
        """Answer a list of labels, the most probable first, for each text; also for a single one."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        model, answers = await service.classify(request, name, texts)
        labels, wanted = model.runtime.bundle.labels, body.parameters
        raw, most = (wanted.function_to_apply == "none", wanted.top_k) if wanted else (False, None)
        rows = [ranked(labels, answer.logits if raw else answer.prediction.probabilities) for answer in answers]
        return JSON([row[:most] for row in rows])

    return router
