"""The interfaces of other servers, spoken to as their clients do."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.engine.task import SingleLabel

from ...toy import LABELS, WORDS

TASK = SingleLabel()

TEXTS = [" ".join(WORDS[at : at + 6]) for at in range(30)]


@pytest.fixture
def client(address: str) -> Any:
    with httpx.Client(base_url=f"http://{address}", timeout=60) as found:
        yield found


def scores(bundle: Path, texts: list[str]) -> list[list[dict[str, Any]]]:
    """The answers of a text-classification pipeline with all labels."""
    answers: list[list[dict[str, Any]]] = CascadeRuntime(bundle, threads=1)(texts, top_k=None)
    return answers


def assert_scores(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_tei_takes_a_text_and_a_batch(client: httpx.Client, bundle: Path) -> None:
    expected = scores(bundle, TEXTS)
    one = client.post("/predict", json={"inputs": TEXTS[0]}).json()
    assert_scores(one, expected[0])
    assert_scores(client.post("/predict", json={"inputs": [TEXTS[0]]}).json(), expected[0])
    many = client.post("/predict", json={"inputs": [[text] for text in TEXTS], "truncate": True}).json()
    for found, row in zip(many, expected, strict=True):
        assert_scores(found, row)


def test_tei_raw_scores_are_logits(client: httpx.Client, bundle: Path) -> None:
    (found,) = client.post("/predict", json={"inputs": [[TEXTS[0]]], "raw_scores": True}).json()
    logits = {row["label"]: row["score"] for row in found}
    probabilities = TASK.probabilities(np.array([[logits[label] for label in LABELS]]))[0]
    assert probabilities == pytest.approx(
        CascadeRuntime(bundle, threads=1).predict(TEXTS[:1])[0].probabilities, abs=1e-5
    )


def test_tei_refuses_what_it_cannot_use(client: httpx.Client) -> None:
    too_long = {"inputs": "film " * 300, "truncate": False}
    assert client.post("/predict", json=too_long).json()["field"] == "truncate"
    assert client.post("/predict", json=too_long | {"truncate": True}).status_code == 200
    for body, field in [
        ({"inputs": []}, "inputs"),
        ({"inputs": ["a", "b", "c"]}, "inputs"),
        ({"inputs": [["a", "b", "c"]]}, "inputs"),
        ({"inputs": ["a", "b"]}, "inputs"),  # a pair, for a bundle on single texts
        ({"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
    ]:
        response = client.post("/predict", json=body)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation"), body
        assert response.json()["field"].startswith(field)
    assert client.post("/predict", json={"inputs": "a", "truncation_direction": "Right"}).status_code == 200


def test_tei_info(client: httpx.Client, bundle: Path) -> None:
    found = client.get("/info").json()
    assert found["model_type"]["classifier"]["id2label"] == {str(at): label for at, label in enumerate(LABELS)}
    assert found["max_input_length"] == CascadeRuntime(bundle).bundle.max_length
    assert [member["name"] for member in found["members"]] == ["tiny", "small", "big"]


_HUGGING_FACE = """
import json, sys
from huggingface_hub import InferenceClient
address, *texts = sys.argv[1:]
client = InferenceClient(f"{address}/models/toy")
found = [client.text_classification(text) for text in texts]
found.append(client.text_classification(texts[0], top_k=1, function_to_apply="none"))
found.append([InferenceClient(address).text_classification(texts[0])])  # as of TEI, it returns the first
print(json.dumps([[{"label": row.label, "score": row.score} for row in rows] for rows in found]))
"""


def test_hugging_face_client(address: str, bundle: Path) -> None:
    """In a process of its own: in this one, huggingface_hub is offline for good."""
    pytest.importorskip("huggingface_hub", minversion="0.26")  # older clients have no top_k
    found = subprocess.run(
        [sys.executable, "-c", _HUGGING_FACE, f"http://{address}", *TEXTS[:5]],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    *rows, (logit,), (first,) = json.loads(found.stdout)
    assert first == rows[0][0]
    for row, expected in zip(rows, scores(bundle, TEXTS[:5]), strict=True):
        assert_scores(row, expected)
    assert logit["label"] == rows[0][0]["label"]
    assert logit["score"] > rows[0][0]["score"]


def test_hugging_face_refuses_what_it_cannot_use(client: httpx.Client) -> None:
    for body, field in [
        ({"inputs": "a", "parameters": {"function_to_apply": "sigmoid"}}, "parameters.function_to_apply"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": [], "parameters": None}, "inputs"),
        ({"inputs": {"text": "a"}}, "inputs"),
    ]:
        response = client.post("/models/toy", json=body)
        assert (response.status_code, response.json()["field"]) == (422, field)
    assert client.post("/models/toys", json={"inputs": "a"}).status_code == 404
    assert client.post("/models/pairs", json={"inputs": "a"}).json()["field"] == "texts.0"


def test_triton_client(address: str, bundle: Path, pair_bundle: Path) -> None:
    """The reference client of the Open Inference Protocol, with binary tensors and without."""
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert not client.is_model_ready("toys")
    described = client.get_model_metadata("toy")
    assert [row["name"] for row in described["inputs"]] == ["text"]
    assert [row["name"] for row in client.get_model_metadata("pairs")["inputs"]] == ["text", "text_pair"]
    expected = CascadeRuntime(bundle, threads=1).predict(TEXTS)
    data = np.array([text.encode() for text in TEXTS], dtype=object)
    for binary in (True, False):
        for shape in ((len(TEXTS),), (len(TEXTS), 1)):
            tensor = triton.InferInput("text", shape, "BYTES")
            tensor.set_data_from_numpy(data.reshape(shape), binary_data=binary)
            for outputs in (None, [triton.InferRequestedOutput(name, binary_data=binary) for name in _ALL]):
                found = client.infer("toy", [tensor], outputs=outputs, request_id="seven")
                assert found.get_response()["id"] == "seven"
                labels = [label if isinstance(label, str) else label.decode() for label in found.as_numpy("label")]
                assert labels == [one.label for one in expected]
                assert found.as_numpy("score") == pytest.approx([one.score for one in expected], abs=1e-5)
                probabilities = found.as_numpy("probabilities")
                assert probabilities.shape == (len(TEXTS), len(LABELS))
                np.testing.assert_allclose(probabilities, [one.probabilities for one in expected], atol=1e-5)
                np.testing.assert_allclose(TASK.probabilities(found.as_numpy("logits")), probabilities, atol=1e-5)
                for name in ("exit", "layers", "truncated"):
                    assert found.as_numpy(name).tolist() == [getattr(one, name) for one in expected]
                assert not found.as_numpy("degraded").any()
    first, second = (triton.InferInput(name, (2,), "BYTES") for name in ("text", "text_pair"))
    first.set_data_from_numpy(data[:2])
    second.set_data_from_numpy(data[2:4])
    pairs = client.infer("pairs", [first, second]).as_numpy("label")
    texts = list(zip(TEXTS[:2], TEXTS[2:4], strict=True))
    assert [label.decode() for label in pairs] == [
        one.label for one in CascadeRuntime(pair_bundle, threads=1).predict(texts)
    ]
    with pytest.raises(triton.InferenceServerException if hasattr(triton, "InferenceServerException") else Exception):
        client.infer("toys", [first])
    client.close()


_ALL = ("label", "score", "probabilities", "logits", "exit", "layers", "truncated", "degraded")
_TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a film"]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [_TEXT | {"name": "ids"}]}, "inputs.0.name"),
        ({"inputs": [_TEXT, _TEXT]}, "inputs.1.name"),
        ({"inputs": [_TEXT | {"datatype": "FP32"}]}, "inputs.0.datatype"),
        ({"inputs": [_TEXT | {"shape": [2]}]}, "inputs.0.shape"),
        ({"inputs": [_TEXT | {"shape": [1, 1, 1]}]}, "inputs.0.shape"),
        ({"inputs": [_TEXT | {"data": [3]}]}, "inputs.0.data"),
        ({"inputs": [_TEXT | {"parameters": {"binary_data_size": 5}}]}, "inputs.0.parameters.binary_data_size"),
        ({"inputs": [_TEXT], "outputs": [{"name": "colour"}]}, "outputs.0.name"),
        ({"inputs": [_TEXT, _TEXT | {"name": "text_pair"}]}, "texts.0"),
        ({"inputs": [_TEXT, _TEXT | {"name": "text_pair", "shape": [0], "data": []}]}, "inputs"),
    ],
)
def test_bad_tensors_name_their_field(client: httpx.Client, body: Any, field: str) -> None:
    response = client.post("/v2/models/toy/infer", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["field"].startswith(field)


@pytest.mark.parametrize("data", [b"\x01", struct.pack("<I", 9) + b"short", struct.pack("<I", 2) + b"\xff\xff"])
def test_damaged_binary_tensors(client: httpx.Client, data: bytes) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    for length in (str(len(header)), "x", "999999", "\xb2", "9" * 5000):
        response = client.post(
            "/v2/models/toy/infer",
            content=header + data,
            headers={b"Inference-Header-Content-Length": length.encode("latin-1")},
        )
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")


def test_a_body_that_is_not_json(client: httpx.Client) -> None:
    for path in ("/v2/models/toy/infer", "/predict"):
        response = client.post(path, content=b"{", headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error_type"]) == (400, "validation")


def test_versions_of_a_model(client: httpx.Client) -> None:
    version = client.get("/v2/models/toy").json()["versions"][0]
    assert client.get(f"/v2/models/toy/versions/{version}").status_code == 200
    assert client.get(f"/v2/models/toy/versions/{version}/ready").json() == {"ready": True}
    assert client.post(f"/v2/models/toy/versions/{version}/infer", json={"inputs": [_TEXT]}).status_code == 200
    assert client.get("/v2/models/toy/versions/12").json()["field"] == "version"
    assert client.get("/v2/models/other").status_code == 404
    assert client.get("/v2").json()["name"] == "cascade-rt"
