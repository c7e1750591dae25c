"""Classify texts over HTTP with FastAPI.

CASCADE_BUNDLE=runs/demo/bundle uvicorn --app-dir examples fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from cascade_rt import CascadeRuntime, InputError


class Texts(BaseModel):
    """Body of a request."""

    texts: list[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, CascadeRuntime]]:
    """Open the bundle when the server starts, so that no request waits for a model to load."""
    with CascadeRuntime(os.environ["CASCADE_BUNDLE"], preload=True) as runtime:
        yield {"runtime": runtime}


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
def classify(body: Texts, request: Request) -> list[dict[str, Any]]:
    """Classify texts. FastAPI runs a plain `def` in its thread pool; threads can share the runtime."""
    try:
        predictions = request.state.runtime.predict(body.texts)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    return [prediction._asdict() for prediction in predictions]
