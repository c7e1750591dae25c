"""The Open Inference Protocol over gRPC, spoken to by its reference client, beside the same protocol over HTTP."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as wire
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.plan import Plan
from cascade_rt.serving.inference_grpc import GRPCServer
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings

from ...toy import WORDS
from .conftest import Gate, listening
from .test_command import free_port, serving
from .test_workers import eventually, is_live

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
        if ours.DESCRIPTOR.file.package != "inference":
            continue
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


_TEXT = {"name": "text", "datatype": "BYTES", "shape": [1]}
_A = struct.pack("<I", 1) + b"a"


@pytest.mark.parametrize(
    ("inputs", "raw", "message"),
    [
        ([], [], "an input named text"),
        ([_TEXT | {"name": "ids"}], [], "inputs.0.name"),
        ([_TEXT | {"datatype": "FP32"}], [b"\0\0\0\0"], "inputs.0.datatype"),
        ([_TEXT | {"shape": [2]}], [_A], "inputs.0.shape"),
        ([_TEXT], [b"\1"], "4 bytes of length"),
        ([_TEXT], [struct.pack("<I", 2) + b"\xff\xff"], "UTF-8"),
        ([_TEXT, _TEXT | {"name": "text_pair"}], [_A], "inputs.1.data"),
        ([_TEXT], [_A, _A], "no bytes after those of the last tensor"),
    ],
)
def test_bad_tensors_name_their_field(stub: Any, inputs: list[dict[str, Any]], raw: list[bytes], message: str) -> None:
    request = wire.ModelInferRequest(model_name="toy", inputs=inputs, raw_input_contents=raw)
    code, found = raised(lambda: stub.ModelInfer(request))
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message in found


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
    assert not client.is_model_ready("toy", "12")


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


def test_a_client_that_goes_takes_its_call_along(
    addresses: tuple[str, str], stub: Any, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cascade_rt.serving.requests")
    gate.close()
    call = stub.ModelInfer.future(_request("a film"))
    gate.wait_for_run()
    call.cancel()
    gate.opened.set()
    eventually("the log", lambda: "cancelled" in {getattr(record, "reason", "") for record in caplog.records})
    metrics = httpx.get(f"http://{addresses[0]}/metrics").text
    assert 'route="/v2/models/{name}/infer",status="499"' in metrics


def test_a_deadline_is_met_by_a_smaller_member(bundle: Path, gate: Gate) -> None:
    """With `degrade`, as over HTTP; the answer has to arrive before the client gives up."""
    settings = Settings(execution=Execution(threads=1), degrade=True)
    with listening(Service({"toy": str(bundle)}, settings), grpc=True) as address, ExitStack() as stack:
        stub = GRPCInferenceServiceStub(stack.enter_context(grpc.insecure_channel(address.split(" ")[1])))
        names = [member.name for member in CascadeRuntime(bundle).bundle.members]
        gate.close()
        call = stub.ModelInfer.future(_request(*TEXTS), timeout=2)
        gate.wait_for_run()
        gate.hold(names[1])
        found = call.result()
    (degraded,) = [at for at, output in enumerate(found.outputs) if output.name == "degraded"]
    assert any(found.raw_output_contents[degraded])


@pytest.fixture
def asked() -> Iterator[Callable[..., Any]]:
    """A stub of a server around an application of the test's own, in a thread."""
    with ExitStack() as stack:

        def serve(app: Any) -> Any:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(loop.call_soon_threadsafe, loop.stop)
            server = GRPCServer(app, "127.0.0.1", 0, max_body=2**40)
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
            stack.callback(lambda: asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10))
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
            return GRPCInferenceServiceStub(channel)

        yield serve


def test_what_the_application_is_told(asked: Callable[..., Any]) -> None:
    headers: list[dict[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        more = [(b"Retry-After", b"3"), (b"X-Request-Id", b"seven")]
        await send({"type": "http.response.start", "status": 503, "headers": more})
        await send({"type": "http.response.body", "body": b'{"error": "full"}'})

    stub = asked(app)
    given = [("authorization", "Bearer x"), ("x-request-id", "seven"), ("cookie", "no"), ("content-length", "9")]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(_request("a film"), metadata=given, timeout=10)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "full")
    returned = dict(caught.value.trailing_metadata())
    assert (returned["retry-after"], returned["x-request-id"]) == ("3", "seven")
    (told,) = headers
    assert (told["authorization"], told["x-request-id"]) == ("Bearer x", "seven")
    assert "cookie" not in told
    assert int(told["content-length"]) > 9
    assert 0 < int(told["x-deadline-ms"]) < 9600, "time for the answer to arrive is left"
    assert not stub.ServerReady(wire.ServerReadyRequest()).ready
    assert "x-deadline-ms" not in headers[-1]


@pytest.mark.parametrize("starts", [True, False])
def test_a_failure_says_nothing_of_the_inside(
    starts: bool, asked: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if starts:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise ValueError("a secret")

    code, message = raised(lambda: asked(app).ServerLive(wire.ServerLiveRequest()))
    assert (code, "secret" in message) == ("StatusCode.INTERNAL", False)
    assert "a secret" in caplog.text


def test_health_checks_of_grpc(addresses: tuple[str, str]) -> None:
    from cascade_rt.serving.inference_messages import MESSAGES

    with grpc.insecure_channel(addresses[1]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=MESSAGES["HealthCheckRequest"].SerializeToString,
            response_deserializer=MESSAGES["HealthCheckResponse"].FromString,
        )
        for service in ("", "inference.GRPCInferenceService"):
            assert check(MESSAGES["HealthCheckRequest"](service=service)).status == 1
        assert raised(lambda: check(MESSAGES["HealthCheckRequest"](service="x")))[0] == "StatusCode.NOT_FOUND"


def test_a_server_that_never_started_can_stop() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    asyncio.run(GRPCServer(app, "127.0.0.1", 0, max_body=1).stop(None))


def test_calls_that_are_tokenized_end_before_the_server(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, begun = Plan.encode, threading.Event()

    def slow(plan: Plan, texts: Any) -> Any:
        begun.set()
        time.sleep(0.5)
        return encode(plan, texts)

    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1)))
    with ExitStack() as stack:
        with listening(service, grpc=True) as address:
            channel = stack.enter_context(grpc.insecure_channel(address.split(" ")[1]))
            monkeypatch.setattr(Plan, "encode", slow)
            call = GRPCInferenceServiceStub(channel).ModelInfer.future(_request("a film " * 5000))  # in a thread
            assert begun.wait(10)
        assert len(call.result(timeout=10).raw_output_contents) == 8


def test_open_calls_end_before_the_server(bundle: Path, gate: Gate) -> None:
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
