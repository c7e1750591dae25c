"""Our own interface, limits, errors, ids, logs, health and metrics."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from cascade_rt import CascadeRuntime, InferenceError
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage
from cascade_rt.serving.classify import ClassifyRequest
from cascade_rt.serving.inference_protocol import InferRequest
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings
from cascade_rt.serving.tei import PredictRequest

from ...toy import LABELS, WORDS
from .conftest import Gate, listening

Served = Callable[..., httpx.Client]
TEXTS = [" ".join(WORDS[at : at + 5]) for at in range(40)]
JSON = {"content-type": "application/json"}


def test_everything_that_a_cascade_knows(served: Served, bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    response = served().post("/v1/classify", json={"texts": TEXTS, "steps": True})
    body = response.json()
    assert (response.status_code, body["model"], body["version"]) == (200, "toy", (runtime.bundle.sha256 or "")[:12])
    for found, expected in zip(body["predictions"], runtime.predict(TEXTS), strict=True):
        assert list(found["probabilities"]) == list(LABELS)
        assert list(found["probabilities"].values()) == pytest.approx(expected.probabilities, abs=1e-5)
        assert found["score"] == max(found["probabilities"].values())
        assert found["member"] == ("tiny", "small", "big")[expected.exit]
        assert found["steps"][-1] == found["probabilities"]
        assert len(found["steps"]) == expected.exit + 1
        for name in ("label", "exit", "layers", "truncated"):
            assert found[name] == getattr(expected, name)
        assert found["degraded"] is False


def test_pairs_and_several_bundles(served: Served, bundle: Path, pair_bundle: Path) -> None:
    client = served({"toy": str(bundle), "pairs": str(pair_bundle)})
    body = client.post("/v1/classify", json={"model": "pairs", "texts": [["the film", "is good"]]}).json()
    (expected,) = CascadeRuntime(pair_bundle, threads=1).predict([("the film", "is good")])
    assert body["model"] == "pairs"
    assert body["predictions"][0]["label"] == expected.label
    assert set(client.get("/health").json()["models"]) == {"toy", "pairs"}


def test_a_stream_has_one_line_per_text_in_order(served: Served, bundle: Path) -> None:
    texts = TEXTS * 10
    client = served(max_queue=100, max_texts=200)
    with client.stream(
        "POST", "/v1/classify", json={"texts": texts}, headers={"accept": "application/x-ndjson"}
    ) as got:
        assert got.headers["content-type"] == "application/x-ndjson"
        rows = [json.loads(line) for line in got.iter_lines()]
    expected = CascadeRuntime(bundle, threads=1).predict(texts)
    assert [row["label"] for row in rows] == [found.label for found in expected]
    assert client.post("/v1/classify", json={"texts": texts}).status_code == 413


def test_an_error_within_a_stream_is_its_last_line(served: Served) -> None:
    texts = [*TEXTS, *TEXTS, "half \\ud83d"]
    body = json.dumps({"texts": texts}).replace("\\\\ud83d", "\\ud83d")
    headers = JSON | {"accept": "application/x-ndjson"}
    response = served().post("/v1/classify", content=body, headers=headers)
    last = json.loads(response.text.splitlines()[-1])
    assert response.status_code in (200, 422)
    assert last["error_type"] == "validation"
    assert "error" in last


def test_an_error_of_a_later_part_of_a_stream_names_the_text(served: Served) -> None:
    body = {"texts": [*TEXTS, *TEXTS[:30], ["a", "pair"], "b"]}
    response = served().post("/v1/classify", json=body, headers={"accept": "application/x-ndjson"})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) == 65, "the first 64 texts, and the error"
    assert lines[-1]["field"] == "texts.70"
    assert lines[-1]["error"].startswith("text 70: ")


def test_a_long_list_of_wrong_elements_gives_one_error() -> None:
    """One error each would be gigabytes for a body of 8 MB."""
    wrong = [1] * 50_000
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": wrong}
    cases: list[tuple[type[BaseModel], dict[str, object]]] = [
        (ClassifyRequest, {"texts": wrong}),
        (ClassifyRequest, {"texts": ["a"], "thresholds": ["b"] * 50_000}),
        (PredictRequest, {"inputs": wrong}),
        (PredictRequest, {"inputs": [[1]] * 50_000}),
        (InferRequest, {"inputs": [tensor]}),
        (InferRequest, {"inputs": wrong}),
    ]
    for model, body in cases:
        with pytest.raises(ValidationError) as raised:
            model.model_validate(body)
        assert raised.value.error_count() < 10


def test_a_browser_may_ask_before_it_has_a_token(bundle: Path) -> None:
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1)))
    asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with listening(service, token="secret", cors_origins=("http://page",)) as address:
        url = f"http://{address}/v1/classify"
        asked = httpx.options(url, headers=asks | {"Access-Control-Request-Headers": "authorization,content-type"})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "http://page")
        refused = httpx.post(url, json={"texts": ["a"]}, headers={"Origin": "http://page"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page")
        other = httpx.options(url, headers=asks | {"Origin": "http://other"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ("{", 400, None),
        ("[]", 422, None),
        ("{}", 422, "texts"),
        ('{"texts": []}', 422, "texts"),
        ('{"texts": "a text"}', 422, "texts"),
        ('{"texts": ["a", 3]}', 422, "texts.1"),
        ('{"texts": ["a", ["b", "c", "d"]]}', 422, "texts.1"),
        ('{"texts": ["a", ["b", "c"]]}', 422, "texts.1"),
        ('{"texts": ["a"], "colour": 1}', 422, "colour"),
        ('{"texts": ["a"], "steps": "perhaps"}', 422, "steps"),
        ('{"texts": ["a"], "thresholds": 2}', 422, "thresholds"),
        ('{"texts": ["a"], "thresholds": [0.5]}', 422, "thresholds"),
        ('{"texts": ["a"], "thresholds": "high"}', 422, "thresholds"),
        ('{"texts": ["a"], "model": "toys"}', 404, "model"),
        ('{"texts": ["a"], "model": 3}', 422, "model"),
        ('{"texts": ["half \\ud83d"]}', 422, "texts.0"),
    ],
)
def test_bad_input_names_its_field(served: Served, body: str, status: int, field: str | None) -> None:
    response = served(allow_thresholds=True).post("/v1/classify", content=body, headers=JSON)
    assert response.status_code == status, response.text
    found = response.json()
    assert found["error"]
    assert found["error_type"] == ("not_found" if status == 404 else "validation")
    assert found.get("field", "").startswith(field or "")
    assert bool(found.get("field")) is (field is not None)


def test_thresholds_of_one_request(served: Served, bundle: Path) -> None:
    refused = served().post("/v1/classify", json={"texts": TEXTS, "thresholds": 0.5})
    assert refused.status_code == 422
    assert "--allow-thresholds" in refused.json()["error"]
    client = served(allow_thresholds=True)
    for thresholds in (0, 1, [0.5, 0.9]):
        found = client.post("/v1/classify", json={"texts": TEXTS, "thresholds": thresholds}).json()["predictions"]
        expected = CascadeRuntime(bundle, threads=1, thresholds=thresholds).predict(TEXTS)
        assert [one["exit"] for one in found] == [one.exit for one in expected]


def test_limits_of_texts_and_bytes(served: Served) -> None:
    client = served(max_texts=10, max_body=2000)
    assert client.post("/v1/classify", json={"texts": ["a"] * 10}).status_code == 200
    many = client.post("/v1/classify", json={"texts": ["a"] * 11})
    assert (many.status_code, many.json()["error_type"]) == (413, "too_large")
    assert "found 11 texts, expected at most 10" in many.json()["error"]
    large = client.post("/v1/classify", json={"texts": ["a" * 2000]})
    assert (large.status_code, large.json()["error_type"]) == (413, "too_large")
    chunks = (b'{"texts": ["', *[b"a" * 500] * 10, b'"]}')
    assert client.post("/v1/classify", content=iter(chunks), headers=JSON).status_code == 413, "no length announced"


def test_a_body_that_does_not_come(served: Served) -> None:
    """The limit of the tests is 2 seconds."""
    url = served().base_url
    with socket.create_connection((url.host, url.port), timeout=10) as slow:
        slow.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_headers_that_do_not_end(served: Served) -> None:
    """The limit of the tests is 2 seconds, on a new connection and on one that has had an answer."""
    url = served().base_url
    for first in (b"", b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"):
        with socket.create_connection((url.host, url.port), timeout=10) as slow:
            if first:
                slow.sendall(first)
                assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
            slow.sendall(b"GET /health HTTP/1.1\r\nhost")
            while slow.recv(1000):
                pass  # the rest of the first answer; b"" is the end of the connection


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "9" * 30, ""])
def test_a_bad_deadline_is_refused(served: Served, value: str) -> None:
    response = served().post("/v1/classify", json={"texts": ["a"]}, headers={"X-Deadline-Ms": value})
    assert (response.status_code, response.json()["field"]) == (422, "X-Deadline-Ms")


def test_a_deadline_that_passes(served: Served, gate: Gate) -> None:
    client = served()
    gate.close()
    started = time.monotonic()
    response = client.post("/v1/classify", json={"texts": ["a"]}, headers={"X-Deadline-Ms": "100"})
    assert (response.status_code, response.json()["error_type"]) == (504, "deadline")
    assert time.monotonic() - started < 5
    gate.opened.set()
    assert client.post("/v1/classify", json={"texts": ["a"]}, headers={"X-Deadline-Ms": "60000"}).status_code == 200


def test_overload_answers_503_at_once_with_when_to_come_back(served: Served, gate: Gate) -> None:
    client = served(max_queue=5)
    gate.close()
    first = threading.Thread(target=lambda: client.post("/v1/classify", json={"texts": ["a"] * 5}))
    first.start()
    gate.wait_for_run()
    refused = client.post("/v1/classify", json={"texts": ["b"]})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    gate.opened.set()
    first.join()
    assert client.post("/v1/classify", json={"texts": ["b"]}).status_code == 200
    assert 'cascade_rejected_total{reason="overloaded"} 1.0' in client.get("/metrics").text


def test_a_client_that_hangs_up_leaves_the_queue(served: Served, gate: Gate) -> None:
    client = served()
    gate.close()
    first = threading.Thread(target=lambda: client.post("/v1/classify", json={"texts": ["a"]}))
    first.start()
    gate.wait_for_run()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(client.base_url.join("/v1/classify"), json={"texts": ["b"] * 7}, timeout=0.5)
    waiting = 'cascade_queue_texts{member="tiny",model="toy"} '
    until = time.monotonic() + 10
    while f"{waiting}0.0" not in client.get("/metrics").text and time.monotonic() < until:
        time.sleep(0.02)
    assert f"{waiting}0.0" in client.get("/metrics").text
    gate.opened.set()
    first.join()
    assert 'cascade_rejected_total{reason="cancelled"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/toy/infer"])
def test_a_client_that_hangs_up_within_its_body(served: Served, path: str) -> None:
    client = served()
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as gone:
        request = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        gone.sendall(request.encode())
    until = time.monotonic() + 10
    while "cascade_rejected_total{" not in (text := client.get("/metrics").text) and time.monotonic() < until:
        time.sleep(0.02)
    assert "cascade_rejected_total{" in text
    assert 'status="500"' not in text


def test_a_model_that_fails_is_a_500_without_a_traceback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served()

    def failing(stage: Stage, batch: Any) -> Any:
        raise InferenceError("member 'tiny' answered NaN or infinity")

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "run", failing)
        response = client.post("/v1/classify", json={"texts": ["a"]})
    assert (response.status_code, response.json()) == (
        500,
        {"error": "member 'tiny' answered NaN or infinity", "error_type": "backend"},
    )
    assert client.post("/v1/classify", json={"texts": ["a"]}).status_code == 200


def test_a_token_guards_everything_but_probes(served: Served) -> None:
    client = served(token="secret")
    for path in ("/v1/classify", "/predict"):
        for headers in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": "secret"}):
            response = client.post(path, json={"texts": ["a"]}, headers=headers)
            assert (response.status_code, response.json()["error_type"]) == (401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").status_code == client.get("/v2/health/ready").status_code == 200
    assert client.post("/v1/classify", json={"texts": ["a"]}, headers={"Authorization": "Bearer secret"}).is_success


def test_request_ids_come_back(served: Served) -> None:
    client = served()
    assert client.get("/health", headers={"X-Request-Id": "job-7/3"}).headers["X-Request-Id"] == "job-7/3"
    for bad in ("a b", "x" * 200, 'a"b'):
        found = client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert re.fullmatch(r"[0-9a-f]{32}", found)


def test_logs_have_the_request_and_never_its_texts(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = served()
    client.post("/v1/classify", json={"texts": ["lovely"]}, headers={"X-Request-Id": "one"})
    client.post("/v1/classify", json={"texts": ["lovely", 3]}, headers={"X-Request-Id": "two"})
    rows = {row["request_id"]: row for row in map(vars, caplog.records) if "request_id" in row}
    assert (rows["one"]["status"], rows["one"]["method"], rows["one"]["path"]) == (200, "POST", "/v1/classify")
    assert rows["one"]["ms"] > 0
    assert (rows["two"]["status"], rows["two"]["reason"]) == (422, "validation")
    assert not any("lovely" in str(vars(row)) for row in caplog.records)


def test_metrics_count_what_ran(served: Served, bundle: Path) -> None:
    client = served()
    exits = [found.exit for found in CascadeRuntime(bundle, threads=1).predict(TEXTS)]
    client.post("/v1/classify", json={"texts": TEXTS})
    text = client.get("/metrics").text
    for exit, name in enumerate(("tiny", "small", "big")):
        assert f'cascade_texts_total{{member="{name}",model="toy"}} {float(exits.count(exit))}' in text
        executed = sum(at >= exit for at in exits)
        assert f'cascade_batch_texts_sum{{member="{name}",model="toy"}} {float(executed)}' in text
        assert f'cascade_wait_seconds_count{{member="{name}",model="toy"}} {float(executed)}' in text
    assert 'cascade_request_seconds_count{route="/v1/classify",status="200"} 1.0' in text
    assert f'cascade_layers_count{{model="toy"}} {float(len(TEXTS))}' in text


def test_the_page_of_the_interfaces_needs_no_foreign_host(served: Served) -> None:
    client = served()
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert all(source.startswith("/") for source in sources)
    assert all(client.get(source).status_code == 200 for source in sources)
    assert {"/v1/classify", "/predict", "/v2/models/{name}/infer"} <= client.get("/openapi.json").json()["paths"].keys()


def test_unknown_paths_and_methods(served: Served) -> None:
    client = served()
    assert client.get("/nothing").json() == {"error": "Not Found", "error_type": "not_found"}
    assert client.get("/v1/classify").status_code == 405
