"""The short way through the server answers as FastAPI does: the same bytes for good requests and for bad ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rt.engine.execution import Execution
from cascade_rt.serving.app import Application, create_app
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings
from cascade_rt.serving.shortcut import Shortcut

PATHS = ("/", "/predict", "/predict/", "/v1/classify", "/models/toy", "/models/none", "/models/a%20b", "/models/toy/x")
GOOD: list[Any] = [
    {"inputs": "the film was good"},
    {"inputs": ["the film was good", "so sad"]},
    {"inputs": [["the film was good"], ["so sad"]]},
    {"inputs": "the film", "raw_scores": True, "truncate": True, "truncation_direction": "right"},
    {"inputs": "the film", "parameters": {"top_k": 2, "function_to_apply": "none"}},
    {"texts": ["the film was good"], "steps": True},
    {"texts": ["the film was good", "so sad"], "model": "toy"},
    {"texts": ["so sad"], "thresholds": [0.0, 0.0]},
    {"texts": ["so sad"], "thresholds": 0.5},
]
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats(-1, 2)
    | st.sampled_from(["toy", "so sad", "\u00e9", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "top_k"]), inner, max_size=2),
    max_leaves=4,
)
_fields = st.sampled_from(["inputs", "texts", "parameters", "model", "steps", "thresholds", "truncate", "other"])
bodies = st.one_of(
    st.sampled_from(GOOD),
    st.builds(
        lambda good, more: {**good, **more}, st.sampled_from(GOOD), st.dictionaries(_fields, _values, max_size=2)
    ),
    st.dictionaries(_fields, _values, max_size=3),
    _values,
).map(lambda body: json.dumps(body).encode())
broken = st.sampled_from([b"", b"{", b"\xff", b'{"inputs": NaN}', b'{"inputs": "\\ud800"}', b'{"texts": ["\\ud800"]}'])
labels = st.sampled_from(["application/json", "text/plain", "application/json; charset=latin-1", "image/png", ""])


@pytest.fixture(scope="module")
def app(bundle: Path) -> Iterator[Application]:
    settings = Settings(execution=Execution(threads=1), allow_thresholds=True, max_texts=2, max_body=5000)
    service = Service({"toy": str(bundle)}, settings)
    yield create_app(service)
    service.close()


def answered(app: Application, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=body, headers={"x-request-id": "one", **headers})

    found = asyncio.run(send())
    return found.status_code, dict(found.headers), found.content


def test_both_ways_answer_alike(app: Application) -> None:
    statuses = set()

    @settings(max_examples=250)
    @given(st.sampled_from(PATHS), bodies | broken, labels, st.sampled_from([{}, {"x-deadline-ms": "x"}]))
    def compare(path: str, body: bytes, label: str, more: dict[str, str]) -> None:
        headers = more | ({"content-type": label} if label else {})
        short = answered(app, path, body, headers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shortcut, "_find", lambda *_: (None, {}))
            assert short == answered(app, path, body, headers)
        statuses.add(short[0])

    compare()
    assert statuses >= {200, 400, 404, 415, 422}


@pytest.mark.parametrize("path", ["/predict", "/v1/classify", "/models/toy"])
def test_good_requests_do_not_reach_fastapi(app: Application, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi.FastAPI.__call__", lambda *_: pytest.fail("it does"))
    body = {"texts": ["so sad"]} if path == "/v1/classify" else {"inputs": "so sad"}
    status, headers, content = answered(app, path, json.dumps(body).encode(), {"content-type": "application/json"})
    assert (status, headers["x-request-id"]) == (200, "one")
    assert json.loads(content)


def test_streams_and_large_bodies(app: Application) -> None:
    headers = {"content-type": "application/json", "accept": "application/x-ndjson"}
    status, found, content = answered(app, "/v1/classify", json.dumps({"texts": ["so sad"] * 5}).encode(), headers)
    assert (status, found["content-type"]) == (200, "application/x-ndjson")
    assert [json.loads(line)["label"] for line in content.splitlines()] == [
        json.loads(content.splitlines()[0])["label"]
    ] * 5
    status, _, content = answered(app, "/predict", json.dumps({"inputs": "x" * 6000}).encode(), headers)
    assert (status, json.loads(content)["error_type"]) == (413, "too_large")
