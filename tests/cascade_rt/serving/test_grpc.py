"""The Open Inference Protocol over gRPC, spoken to by its reference client, beside the same protocol over HTTP."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings

from ...toy import WORDS
from .conftest import Gate, listening
from .test_command import free_port, serving
from .test_workers import eventually, is_live

grpc = pytest.importorskip("grpc")
triton = pytest.importorskip("tritonclient.grpc")
wire = pytest.importorskip("tritonclient.grpc.service_pb2")

TEXTS = [" ".join(WORDS[at : at + 6]) for at in range(30)]


@pytest.fixture(scope="module")
def addresses(bundle: Path, pair_bundle: Path) -> Iterator[tuple[str, str]]:
    """A server with the bundles `toy` and `pairs`: where it speaks HTTP, and gRPC."""
    service = Service({"toy": str(bundle), "pairs": str(pair_bundle)}, Settings(execution=Execution(threads=1)))
    with listening(service, grpc=True) as address:
        http, grpc_address = address.split(" ")
        yield http, grpc_address


@pytest.fixture
def client(addresses: tuple[str, str]) -> Iterator[Any]:
    with triton.InferenceServerClient(addresses[1]) as found:
        yield found


@pytest.fixture
def stub(addresses: tuple[str, str]) -> Iterator[Any]:
    """The generated stub below the client, for messages that the client does not send."""
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

    with grpc.insecure_channel(addresses[1]) as channel:
        yield GRPCInferenceServiceStub(channel)


def tensor(name: str, texts: list[str], shape: tuple[int, ...] | None = None) -> Any:
    shape = shape or (len(texts),)
    found = triton.InferInput(name, shape, "BYTES")
    found.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object).reshape(shape))
    return found


def _request(*texts: str) -> Any:
    """A request with its texts in the message, not behind it."""
    found = wire.ModelInferRequest(model_name="toy")
    part = found.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    part.contents.bytes_contents.extend(text.encode() for text in texts)
    return found


def test_messages_are_those_of_the_protocol() -> None:
    """Names, numbers and types of all fields, against the classes that the reference client was generated with."""
    from cascade_rt.serving.inference_messages import MESSAGES, SERVICE

    def fields(descriptor: Any) -> set[tuple[str, int, int, str | None]]:
        return {
            (one.name, one.number, one.type, one.message_type.full_name if one.message_type else None)
            for one in descriptor.fields
        }

    for path, ours in MESSAGES.items():
        outer, *inner = path.split(".")
        theirs = wire.DESCRIPTOR.message_types_by_name[outer]
        for part in inner:
            theirs = theirs.nested_types_by_name[part]
        assert fields(ours.DESCRIPTOR) <= fields(theirs), path
    assert wire.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name == SERVICE


def test_answers_are_those_over_http(client: Any, addresses: tuple[str, str]) -> None:
    texts = [tensor("text", TEXTS)], [tensor("text", TEXTS, (len(TEXTS), 1))]
    asked = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}]}
    expected = httpx.post(f"http://{addresses[0]}/v2/models/toy/infer", json=asked).json()
    for inputs in texts:
        found = client.infer("toy", inputs, request_id="seven")
        response = found.get_response()
        assert (response.model_name, response.model_version, response.id) == ("toy", expected["model_version"], "seven")
        assert [one.name for one in response.outputs] == [one["name"] for one in expected["outputs"]]
        for output in expected["outputs"]:
            values = found.as_numpy(output["name"])
            assert list(values.shape) == output["shape"]
            if output["datatype"] == "BYTES":
                assert [value.decode() for value in values] == output["data"]
            else:
                np.testing.assert_allclose(values.ravel(), output["data"], atol=1e-5)
    some = client.infer("toy", texts[0], outputs=[triton.InferRequestedOutput(name) for name in ("exit", "label")])
    assert [output.name for output in some.get_response().outputs] == ["exit", "label"]
    pairs = client.infer("pairs", [tensor("text", TEXTS[:3]), tensor("text_pair", TEXTS[3:6])])
    assert len(pairs.as_numpy("label")) == 3


def test_contents_may_be_in_the_message(stub: Any, client: Any) -> None:
    inside = _request(*TEXTS[:2])
    inside.parameters["colour"].string_param = "ignored"
    found = stub.ModelInfer(inside)
    raw = client.infer("toy", [tensor("text", TEXTS[:2])]).get_response()
    assert (found.outputs, found.raw_output_contents) == (raw.outputs, raw.raw_output_contents)


def test_the_server_and_its_models(client: Any, addresses: tuple[str, str]) -> None:
    with httpx.Client(base_url=f"http://{addresses[0]}/v2") as http:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata(as_json=True) == {
            name: value for name, value in http.get("").json().items() if name != "extensions"
        }
        for model in ("toy", "pairs"):
            expected = http.get(f"models/{model}").json()
            found = client.get_model_metadata(model)
            assert [(one.name, one.datatype, list(one.shape)) for one in [*found.inputs, *found.outputs]] == [
                (one["name"], one["datatype"], one["shape"]) for one in expected["inputs"] + expected["outputs"]
            ]
            assert (found.name, list(found.versions), found.platform) == (
                expected["name"], expected["versions"], expected["platform"],
            )  # fmt: skip
            assert client.is_model_ready(model, found.versions[0])
        one = client.infer("toy", [tensor("text", ["a"])], model_version=http.get("models/toy").json()["versions"][0])
        assert one.as_numpy("label").shape == (1,)
    assert not client.is_model_ready("toys")


def raised(call: Callable[[], object]) -> tuple[str, str]:
    """The code and the message of a call that fails."""
    with pytest.raises((grpc.RpcError, triton.InferenceServerException)) as caught:
        call()
    error = caught.value
    if isinstance(error, grpc.RpcError):
        return f"StatusCode.{error.code().name}", error.details()
    return error.status(), error.message()


@pytest.mark.parametrize(
    ("inputs", "raw", "message"),
    [
        ([], [], "found no"),
        ([{"name": "ids", "datatype": "BYTES", "shape": [1]}], [], "inputs.0.name"),
        ([{"name": "text", "datatype": "FP32", "shape": [1]}], [b"\0\0\0\0"], "inputs.0.datatype"),
        ([{"name": "text", "datatype": "BYTES", "shape": [2]}], [struct.pack("<I", 1) + b"a"], "inputs.0.shape"),
        ([{"name": "text", "datatype": "BYTES", "shape": [1]}], [b"\1"], "4 bytes of length"),
        ([{"name": "text", "datatype": "BYTES", "shape": [1]}], [struct.pack("<I", 2) + b"\xff\xff"], "UTF-8"),
        ([{"name": "text", "datatype": "BYTES", "shape": [1]}], [b"", b""], "raw_input_contents: found 2, expected 1"),
    ],
)
def test_bad_tensors_name_their_field(stub: Any, inputs: list[dict[str, Any]], raw: list[bytes], message: str) -> None:
    request = wire.ModelInferRequest(model_name="toy", inputs=inputs, raw_input_contents=raw)
    code, found = raised(lambda: stub.ModelInfer(request))
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message in found or not inputs


@pytest.mark.parametrize("name", ["toys", "toy/infer", "toy/versions/1", "", "..", "?"])
def test_a_model_that_is_not_served(client: Any, stub: Any, name: str) -> None:
    code, message = raised(lambda: client.infer(name, [tensor("text", ["a"])]))
    assert code == "StatusCode.NOT_FOUND"
    assert raised(lambda: stub.ModelMetadata(wire.ModelMetadataRequest(name=name)))[0] == "StatusCode.NOT_FOUND"
    if name == "toys":
        assert message == "found no model 'toys'; expected one of: toy, pairs"


def test_another_version(client: Any) -> None:
    code, message = raised(lambda: client.infer("toy", [tensor("text", ["a"])], model_version="12"))
    assert (code, message.partition(":")[0]) == ("StatusCode.INVALID_ARGUMENT", "`version`")


def test_metadata_carries_the_token_and_the_id(bundle: Path) -> None:
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1), max_texts=2))
    with (
        listening(service, grpc=True, token="secret") as address,
        triton.InferenceServerClient(address.split(" ")[1]) as client,
    ):
        assert client.is_server_ready(), "probes need no token"
        assert raised(lambda: client.infer("toy", [tensor("text", ["a"])]))[0] == "StatusCode.UNAUTHENTICATED"
        assert raised(lambda: client.is_model_ready("toy"))[0] == "StatusCode.UNAUTHENTICATED"
        allowed = {"authorization": "Bearer secret"}
        assert client.infer("toy", [tensor("text", ["a"])], headers=allowed).as_numpy("label").shape == (1,)
        many = raised(lambda: client.infer("toy", [tensor("text", ["a"] * 3)], headers=allowed))
        assert (many[0], "at most 2" in many[1]) == ("StatusCode.RESOURCE_EXHAUSTED", True)


def test_a_body_that_is_too_large(bundle: Path) -> None:
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1), max_body=10_000))
    with listening(service, grpc=True) as address, triton.InferenceServerClient(address.split(" ")[1]) as client:
        for size in (20_000, 200_000):  # refused by the application, and by gRPC
            code, _ = raised(lambda size=size: client.infer("toy", [tensor("text", ["a" * size])]))  # type: ignore[misc]
            assert code == "StatusCode.RESOURCE_EXHAUSTED"


def test_deadlines_and_clients_that_go(
    addresses: tuple[str, str], stub: Any, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """A call whose client has gone is taken out of the queue, and logged as cancelled."""
    caplog.set_level("INFO", "cascade_rt.serving.requests")
    request = _request("a film")
    gate.close()
    assert raised(lambda: stub.ModelInfer(request, timeout=0.3))[0] == "StatusCode.DEADLINE_EXCEEDED"
    gate.opened.set()
    gate.close()
    call = stub.ModelInfer.future(request)
    gate.wait_for_run()
    call.cancel()
    gate.opened.set()
    eventually("the log", lambda: "cancelled" in {getattr(record, "reason", "") for record in caplog.records})
    metrics = httpx.get(f"http://{addresses[0]}/metrics").text
    assert 'route="/v2/models/{name}/infer",status="499"' in metrics


def test_open_calls_end_before_the_server(bundle: Path, gate: Gate) -> None:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1)))
    with ExitStack() as stack:
        with listening(service, grpc=True) as address:
            channel = stack.enter_context(grpc.insecure_channel(address.split(" ")[1]))
            gate.close()
            call = GRPCInferenceServiceStub(channel).ModelInfer.future(_request("a film"))
            gate.wait_for_run()
            threading.Timer(0.3, gate.opened.set).start()
        assert len(call.result(timeout=10).raw_output_contents) == 8


def test_the_command_serves_both(bundle: Path) -> None:
    port = free_port()
    with serving("--model-dir", str(bundle), "--grpc-port", str(port)) as (process, _):
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            eventually("gRPC", lambda: is_live(client))
            assert client.infer("default", [tensor("text", TEXTS)]).as_numpy("label").shape == (len(TEXTS),)
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert f"gRPC on 127.0.0.1:{port}" in (process.stderr.read() if process.stderr else "")


def test_a_grpc_port_that_is_taken(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model-dir", str(bundle), "--port", "0", "--grpc-port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def test_grpc_is_not_served_on_clusters(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-dir", str(bundle), "--engine", "ray", "--grpc-port", "1"]) == 2
    assert "--grpc-port: found 1, expected none with --engine ray" in capfd.readouterr().err
