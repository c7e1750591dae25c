"""HTTP as clients speak it: offers of other protocols, bodies of any size and form, methods, and a prefix of paths."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.types import Message

from cascade_rt import CascadeRuntime, InvalidOption
from cascade_rt.engine.execution import Execution
from cascade_rt.serving import body as bodies
from cascade_rt.serving.app import create_app
from cascade_rt.serving.body import Body
from cascade_rt.serving.json_body import read_json
from cascade_rt.serving.metrics import Metrics
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import OWN_PATHS, Settings

from .conftest import listening

LIMIT = 50_000
JSON = {"Content-Type": "application/json"}
BODY = b'{"inputs": "the film was good"}'
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = (
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.fixture(scope="module")
def at(bundle: Path, pair_bundle: Path) -> Iterator[str]:
    """The address of a server with a low limit of bodies, and half a second for each."""
    service = Service(
        {"toy": str(bundle), "pairs": str(pair_bundle)},
        Settings(execution=Execution(threads=1), reload_seconds=0, max_body=LIMIT),
    )
    with listening(service, body_seconds=0.5) as address:
        yield address


@pytest.fixture(scope="module")
def client(at: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{at}", timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def expected(client: httpx.Client) -> Any:
    """The answer to BODY."""
    return client.post("/predict", content=BODY, headers=JSON).json()


def connected(address: str) -> socket.socket:
    host, port = address.split(":")
    found = socket.create_connection((host, int(port)), timeout=10)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def asked(headers: str = "", body: bytes = BODY, *, line: str = "POST /predict HTTP/1.1", length: bool = True) -> bytes:
    more = f"Content-Length: {len(body)}\r\n" if length else ""
    return f"{line}\r\nHost: a\r\nContent-Type: application/json\r\n{headers}{more}\r\n".encode() + body


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def everything(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def answers(address: str, *parts: bytes) -> bytes:
    """Send the parts and a request that ends the connection; return all that comes until then."""
    with connected(address) as connection:
        for part in (*parts, asked("Connection: close\r\nX-Request-Id: last\r\n")):
            connection.sendall(part)
        found = everything(connection)
    assert found.count(b"x-request-id: last\r\n") == 1
    return found


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET, "Upgrade: h2c, other\r\nconnection: upgrade\r\n"])
def test_an_offer_of_another_protocol_is_ignored(at: str, expected: Any, offer: str) -> None:
    offered = asked(offer)
    in_chunks = asked(f"{offer}Transfer-Encoding: chunked\r\n", chunked(BODY[:7], BODY[7:]), length=False)
    without_body = asked(offer, b"", line="GET /info HTTP/1.1", length=False)
    for parts in (
        [offered],
        [offered * 3],
        [offered, asked(), in_chunks],
        [in_chunks],
        [without_body + offered + without_body],
        [bytes([byte]) for byte in offered],
        [offered[:-5], offered[-5:] + in_chunks[:100], in_chunks[100:]],
    ):
        found = answers(at, *parts)
        sent = b"".join(parts)
        assert found.count(b"HTTP/1.1 200 OK\r\n") == 1 + sent.count(b"POST ") + sent.count(b"GET ")
        assert found.count(json.dumps(expected, separators=(",", ":")).encode()) == 1 + sent.count(b"POST ")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("connection", ["close, Upgrade", "Upgrade, close"])
def test_an_offer_with_the_last_request_of_a_connection(at: str, version: str, connection: str) -> None:
    offered = asked(f"Connection: {connection}\r\nUpgrade: h2c\r\n", line=f"POST /predict HTTP/{version}")
    for parts in ([offered], [offered[:-5], offered[-5:]]):
        with connected(at) as sending:
            for part in parts:
                sending.sendall(part)
            found = everything(sending)
        assert found.startswith(b"HTTP/1.1 200 ")
        assert found.count(b'"score"') == 3


def test_pipelined_requests_are_answered_in_order(at: str) -> None:
    found = answers(at, b"".join(asked(f"{H2C * (at % 2)}X-Request-Id: r{at}\r\n") for at in range(6)))
    places = [found.index(f"x-request-id: r{at}\r\n".encode()) for at in range(6)]
    assert places == sorted(places)


def test_it_is_no_proxy(at: str) -> None:
    with connected(at) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_waits_for_a_word_before_its_body(at: str) -> None:
    whole = asked("Expect: 100-continue\r\nConnection: close\r\n")
    with connected(at) as connection:
        connection.sendall(whole[: -len(BODY)])
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    for path, length, status in (("/predict", LIMIT + 1, 413), ("/nothing", 9, 404)):
        with connected(at) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode())
            found = everything(connection)
            assert found.startswith(f"HTTP/1.1 {status} ".encode())
            assert found.lower().count(b"connection: close\r\n") == 1


def test_http_1_0_has_no_chunks(at: str) -> None:
    body = b'{"texts": ["a", "b"]}'
    with connected(at) as connection:
        line = "POST /v1/classify HTTP/1.0"
        connection.sendall(asked("Accept: application/x-ndjson\r\n", body, line=line))
        found = everything(connection)
    head, _, rows = found.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert [json.loads(row)["model"] for row in rows.splitlines()] == ["toy", "toy"]


@pytest.mark.parametrize("headers", ["", "Connection: close\r\n"])
@pytest.mark.parametrize("line", ["POST /predict HTTP/1.1", "POST /v2/models/toy/infer HTTP/1.1", "POST / HTTP/1.0"])
def test_a_body_that_is_too_large_gets_its_answer(at: str, headers: str, line: str) -> None:
    """Megabytes: more than the buffers of a socket hold, so that the client can only send while they are read."""
    large = BODY[:-2] + b"x" * 8_000_000 + BODY[-2:]
    sent = [asked(headers, large, line=line)]
    if line.endswith("1.1"):
        in_chunks = chunked(large[:4_000_000], large[4_000_000:])
        sent.append(asked(f"{headers}Transfer-Encoding: chunked\r\n", in_chunks, line=line, length=False))
    for request in sent:
        with connected(at) as connection:
            connection.sendall(request)
            found = everything(connection)
        head, _, answer = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert json.loads(answer) == {
            "error": f"the body is over {LIMIT:,} bytes; send several requests",
            "error_type": "too_large",
        }


@pytest.mark.parametrize(("line", "status"), [("POST /nothing HTTP/1.1", 404), ("PUT /predict HTTP/1.1", 405)])
def test_a_refusal_reads_the_body_too(at: str, line: str, status: int) -> None:
    large = b"x" * 8_000_000
    with connected(at) as connection:
        connection.sendall(asked("Connection: close\r\n", large, line=line))
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())
    found = answers(at, asked("", large, line=line))
    assert found.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"HTTP/1.1 200 OK" in found, "the connection is of further use"


def test_the_rest_of_a_body_is_waited_for_within_limits(at: str) -> None:
    with connected(at) as connection:
        connection.sendall(asked("Content-Length: 9000000000\r\n", b"x" * 1000, length=False))
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_the_rest_of_a_body_is_read_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_DISCARDED", 1_000_000)
    left = 10_000_000

    async def receive() -> Message:
        nonlocal left
        left -= 1000
        return {"type": "http.request", "body": bytes(1000), "more_body": left > 0}

    asyncio.run(Body({b"transfer-encoding": b"chunked"}, receive, LIMIT, 30.0).discard())
    assert left == pytest.approx(9_000_000, abs=2000)


def test_a_body_that_a_proxy_lost() -> None:
    """As Ray Serve's does after an offer of HTTP/2."""

    async def receive() -> Message:
        return {"type": "http.request"}

    with pytest.raises(HTTPException) as raised:
        asyncio.run(Body({b"content-length": b"31"}, receive, LIMIT, 30.0).receive())
    assert (raised.value.status_code, raised.value.detail[:33]) == (400, "found 0 bytes of a body of 31; a ")


def received(parts: list[bytes], encoding: bytes, most: int = LIMIT) -> bytes:
    """The beginning of a body that is sent in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Message:
        return messages.pop(0)

    async def read() -> bytes:
        body = Body({b"content-encoding": encoding, b"transfer-encoding": b"chunked"}, receive, most, 10.0)
        found = b""
        while not body.is_complete:
            found += (await body.receive())["body"]
        return found

    return asyncio.run(read())


def raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


ENCODERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"X-GZip": lambda data: gzip.compress(data[:3]) + gzip.compress(data[3:]),  # two files
    b"deflate": zlib.compress,
    b"deflate, identity": raw_deflate,
    b"identity": bytes,
}


@given(data=st.binary(max_size=300), encoding=st.sampled_from(sorted(ENCODERS)), size=st.integers(1, 80))
def test_compressed_bodies(data: bytes, encoding: bytes, size: int) -> None:
    sent = ENCODERS[encoding](data)
    parts = [sent[at : at + size] for at in range(0, len(sent), size)]
    most = max(len(data), len(sent))
    assert received(parts, encoding, most) == data
    if most:
        with pytest.raises(HTTPException) as raised:
            received(parts, encoding, most - 1)
        assert raised.value.status_code == 413
    if encoding != b"identity":
        with pytest.raises(HTTPException) as raised:
            received([sent[:-1]], encoding)
        assert raised.value.status_code == 400


def test_a_bomb_is_not_blown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(30_000_000))
    assert len(bomb) < LIMIT
    sizes = []
    decompress = bodies._Decompressor.decompress

    def measured(self: Any, data: bytes, room: int) -> bytes:
        found = decompress(self, data, room)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(bodies._Decompressor, "decompress", measured)
    with pytest.raises(HTTPException) as raised:
        received([bomb[:9000], bomb[9000:]], b"gzip")
    assert raised.value.status_code == 413
    assert sizes == [LIMIT + 1]


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzipped(BODY), 200),
        ("br", BODY, 415),
        ("zstd", BODY, 415),
        ("gzip, gzip", gzipped(gzipped(BODY)), 415),
        ("gzip", BODY, 400),
        ("gzip", gzipped(BODY) + b"more", 400),
        ("gzip", gzipped(BODY)[:-1], 400),
        ("deflate", b"\x08", 400),
        ("gzip", gzipped(b" " * 10 * LIMIT + BODY), 413),
    ],
)
def test_encodings_of_a_body(client: httpx.Client, expected: Any, encoding: str, body: bytes, status: int) -> None:
    response = client.post("/predict", content=body, headers=JSON | {"Content-Encoding": encoding})
    assert response.status_code == status, response.text
    if status == 200:
        assert response.json() == expected
    if status == 415:
        assert response.headers["Accept-Encoding"] == "gzip, deflate"
        assert encoding in response.json()["error"]


@given(
    text=st.text(st.characters(codec="utf-8")),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]),
    labelled=st.booleans(),
)
def test_json_in_any_unicode(text: str, encoding: str, labelled: bool) -> None:
    from starlette.datastructures import Headers

    kind = f"application/json; charset={encoding.removesuffix('-sig')}" if labelled else "application/json"
    body = json.dumps({"inputs": text}, ensure_ascii=False).encode(encoding)
    assert read_json(Headers({"content-type": kind}), body) == {"inputs": text}


@pytest.mark.parametrize("path", ["/predict", "/v2/models/toy/infer"])
def test_labels_of_a_body(client: httpx.Client, path: str) -> None:
    def ask(kind: str | None, encoding: str = "utf-8", **headers: str) -> httpx.Response:
        text = "un café à Zürich, 1€"
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
        body = {"inputs": text} if path == "/predict" else {"inputs": [tensor], "outputs": [{"name": "logits"}]}
        content = json.dumps(body, ensure_ascii=False).encode(encoding)
        return client.post(path, content=content, headers=headers | ({"Content-Type": kind} if kind else {}))

    right = ask("application/json")
    assert right.status_code == 200
    for kind in (None, "application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "application/octet-stream"):
        assert ask(kind).json() == right.json(), kind
        refused = ask(kind, Origin="http://page.example")
        assert (refused.status_code, refused.json()["error_type"]) == (415, "validation"), "a page need not ask for it"
    for kind in ("Application/JSON", 'application/json; charset="utf-8"', "application/vnd.api+json"):
        assert ask(kind, Origin="http://page.example").json() == right.json(), kind
    assert ask("application/json; charset=windows-1252", "cp1252").json() == right.json()
    assert ask("text/plain; charset=ISO-8859-15", "iso8859-15").json() == right.json()
    for kind in ("application/xml", "multipart/form-data; boundary=a", "application/json; charset=base64"):
        assert ask(kind).status_code == 415, kind


@pytest.mark.parametrize("path", ["/predict", "/v1/classify", "/models/toy", "/v2/models/toy/infer"])
@pytest.mark.parametrize(
    "body",
    [
        b"text=a",
        b'{"inputs": "a"} more',
        b'{"inputs": NaN}',
        b'{"inputs": "a", "other": -Infinity}',
        b'{"inputs": "a", "other": ' + b"9" * 5000 + b"}",
        b"[" * 20_000,
        b'{"inputs": "\xff"}',
        b"\xff\xfe{",
    ],
)
def test_a_body_that_is_not_json(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers=JSON)
    assert (response.status_code, response.json()["error_type"]) == (400, "validation")
    assert response.json()["error"].startswith("the body is not JSON (")


def tensor(data: Any, **more: Any) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(data)], "data": data} | more


def test_half_a_surrogate_pair_is_named_by_every_interface(client: httpx.Client) -> None:
    for path, body in (
        ("/predict", {"inputs": [["a"], ["\ud83d"]]}),
        ("/v1/classify", {"texts": ["a", "\ud83d"]}),
        ("/models/toy", {"inputs": ["a", "\ud83d"]}),
        ("/v2/models/toy/infer", {"inputs": [tensor(["a", "\ud83d"])]}),
    ):
        response = client.post(path, content=json.dumps(body), headers=JSON)
        assert (response.status_code, response.json()["field"]) == (422, "texts.1"), path


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/predict", {"inputs": [["a"], [None], ["c"]]}, "inputs.1.0"),
        ("/predict", {"inputs": [["a"], "b"]}, "inputs.1"),
        ("/predict", {"inputs": [["a"], ["b", None]]}, "inputs.1.1"),
        ("/predict", {"inputs": [["a"], []]}, "inputs.1"),
        ("/predict", {"inputs": ["a", None]}, "inputs.1"),
        ("/predict", {"inputs": None}, "inputs"),
        ("/v1/classify", {"texts": ["a", None, "c"]}, "texts.1"),
        ("/v1/classify", {"texts": [["a", "b"], ["c", 3]]}, "texts.1.1"),
        ("/v1/classify", {"texts": [["a", "b"], ["c"]]}, "texts.1.1"),
        ("/v1/classify", {"texts": ["a"], "thresholds": [0.5, "b"]}, "thresholds.1"),
        ("/v1/classify", {"texts": ["a"], "my field": 3}, "my field"),
        ("/v1/classify", {"texts": ["a"], "x" * 1000: 3}, "x" * 80),
        ("/models/toy", {"inputs": ["a", None, "c"]}, "inputs.1"),
        ("/models/toy", {"inputs": [["a"]]}, "inputs.0"),
        ("/models/toy", {"inputs": "a", "parameters": {"truncation": "b"}}, "parameters.truncation"),
        ("/models/toy", {"inputs": "a", "parameters": {"max_length": 5}}, "parameters.max_length"),
        ("/models/toy", {"inputs": "a", "parameters": {"colour": 5}}, "parameters.colour"),
        ("/models/toy", {"inputs": "film " * 300, "parameters": {"truncation": False}}, "truncate"),
        ("/v2/models/toy/infer", {"inputs": [tensor(["a", None, "c"])]}, "inputs.0.data.1"),
        ("/v2/models/toy/infer", {"inputs": [tensor([["a"], [None], ["c"]])]}, "inputs.0.data.1.0"),
        ("/v2/models/toy/infer", {"inputs": [tensor("a")]}, "inputs.0.data"),
        ("/v2/models/toy/infer", {"inputs": [tensor(["a"]), tensor(["b"], datatype=3)]}, "inputs.1.datatype"),
    ],
)
def test_an_error_names_the_wrong_element(client: httpx.Client, path: str, body: Any, field: str) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json().get("field")) == (422, field), response.text


@pytest.mark.parametrize(("inputs", "count"), [([], 0), (["a", "b", "c"], 3), ([["a"], ["a", "b", "c"]], 3)])
def test_tei_is_told_how_to_send_a_batch(client: httpx.Client, inputs: Any, count: int) -> None:
    response = client.post("/predict", json={"inputs": inputs})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error.endswith(f'found a list of {count}, expected ["a"] or a pair ["a", "b"]; a batch is [["a"], ["b"]]')


def test_two_strings_are_no_batch_for_tei(client: httpx.Client) -> None:
    found = client.post("/predict", json={"inputs": ["first", "second"]}).json()
    assert (found["field"], found["error_type"]) == ("inputs", "validation")
    assert 'a batch is [["a"], ["b"]]' in found["error"]


@pytest.mark.parametrize("more", [{}, {"data": None}, {"data": None, "parameters": {"shared_memory_region": "r"}}])
def test_a_tensor_without_texts(client: httpx.Client, more: dict[str, Any]) -> None:
    without = {"name": "text", "datatype": "BYTES", "shape": [1]} | more
    found = client.post("/v2/models/toy/infer", json={"inputs": [without]})
    assert (found.status_code, found.json()["field"]) == (422, "inputs.0.data")
    assert "found None, expected texts" in found.json()["error"]


def test_null_is_as_good_as_nothing(client: httpx.Client) -> None:
    """As pydantic's model_dump writes fields that are not set."""
    for path, body, nulls in (
        ("/predict", {"inputs": "a"}, {"raw_scores": None, "truncate": None, "truncation_direction": None}),
        ("/v1/classify", {"texts": ["a"]}, {"model": None, "thresholds": None, "steps": None}),
        ("/models/toy", {"inputs": "a"}, {"parameters": None}),
        ("/v2/models/toy/infer", {"inputs": [tensor(["a"])]}, {"id": None, "outputs": None, "parameters": None}),
    ):
        plain, with_nulls = client.post(path, json=body), client.post(path, json=body | nulls)
        assert (with_nulls.status_code, with_nulls.json()) == (200, plain.json()), path
    names = ("top_k", "return_all_scores", "function_to_apply", "truncation", "max_length", "padding")
    found = client.post("/models/toy", json={"inputs": "a", "parameters": dict.fromkeys(names)})
    assert found.json() == client.post("/models/toy", json={"inputs": "a"}).json()
    outputs = [{"name": "label", "parameters": None}]
    found = client.post("/v2/models/toy/infer", json={"inputs": [tensor(["a"], parameters=None)], "outputs": outputs})
    assert [row["name"] for row in found.json()["outputs"]] == ["label"]


def test_what_other_servers_ignore_is_ignored(client: httpx.Client) -> None:
    for path, body in (
        ("/predict", {"inputs": "a", "prompt_name": "query", "normalize": True, "parameters": {"top_k": 1}}),
        ("/models/toy", {"inputs": "a", "options": {"wait_for_model": True, "use_cache": False}}),
        ("/v2/models/toy/infer", {"inputs": [tensor(["a"], colour=3)], "timeout": 3, "parameters": {"priority": 1}}),
    ):
        plain = client.post(path, json={"inputs": "a" if path[1] != "v" else [tensor(["a"])]})
        found = client.post(path, json=body)
        assert (found.status_code, found.json()) == (200, plain.json()), path


def test_parameters_of_pipelines(client: httpx.Client) -> None:
    def ask(**parameters: Any) -> Any:
        return client.post("/models/toy", json={"inputs": "the film", "parameters": parameters}).json()

    (whole,) = ask()
    assert ask(truncation=True, max_length=512, padding="max_length", return_all_scores=True) == [whole]
    assert ask(return_all_scores=False) == ask(top_k=1) == [whole[:1]]
    assert ask(return_all_scores=False, top_k=2) == [whole[:2]]
    assert ask(function_to_apply="SoftMax") == [whole]
    assert ask(function_to_apply="NONE") == ask(function_to_apply="none") != [whole]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "\0"])
def test_texts_without_words_are_those_of_the_engine(client: httpx.Client, bundle: Path, text: str) -> None:
    (right,) = CascadeRuntime(bundle, threads=1).predict([text])
    (own,) = client.post("/v1/classify", json={"texts": [text]}).json()["predictions"]
    (row,) = client.post("/models/toy", json={"inputs": text}).json()
    outputs = client.post("/v2/models/toy/infer", json={"inputs": [tensor([text])]}).json()["outputs"]
    answers = [
        (own["label"], own["score"]),
        tuple(row[0].values()),
        tuple(client.post("/predict", json={"inputs": text}).json()[0].values()),
        tuple(client.post("/predict", json={"inputs": [[text]]}).json()[0][0].values()),
        (outputs[0]["data"][0], outputs[1]["data"][0]),
    ]
    for label, score in answers:
        assert (label, score) == (right.label, pytest.approx(right.score, abs=1e-5))


def test_head_is_get_without_its_body(client: httpx.Client) -> None:
    paths = [path for path, found in client.get("/openapi.json").json()["paths"].items() if "get" in found]
    version = client.get("/v2/models/toy").json()["versions"][0]
    more = ("/", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/health/")
    for path in (*(path.format(name="toy", version=version) for path in paths), *more):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"") == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/nothing").status_code == 404
    assert client.head("/predict").status_code == 405


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", "HEAD, GET, POST, OPTIONS"),
        ("/health", "HEAD, GET, OPTIONS"),
        ("/predict/", "POST, OPTIONS"),
        ("/models/toy", "POST, OPTIONS"),
        ("/docs", "HEAD, GET, OPTIONS"),
        ("/static-offline-docs/swagger-ui.css", "HEAD, GET, OPTIONS"),
    ],
)
def test_methods_of_a_path(client: httpx.Client, path: str, methods: str) -> None:
    options, refused = client.options(path), client.put(path)
    assert (options.status_code, options.headers["Allow"], options.content) == (204, methods, b"")
    assert (refused.status_code, refused.headers["Allow"]) == (405, methods)


def test_the_root_answers_as_tei(client: httpx.Client, expected: Any) -> None:
    before = client.get("/metrics").text.count('cascade_request_seconds_count{route="/",status="200"}')
    assert client.post("/", content=BODY, headers=JSON).json() == expected
    text = client.get("/metrics").text
    assert text.count('cascade_request_seconds_count{route="/",status="200"}') == before, "it counts as /predict"
    assert (
        client.post("/", json={"inputs": [["a"], ["b"]]}).json()
        == client.post("/predict/", json={"inputs": [["a"], ["b"]]}).json()
    )


def test_a_token_guards_the_root_but_for_the_page(served: Any) -> None:
    client = served(token="secret", root_path="/toys")
    for path in ("/", "/toys", "/toys/"):
        assert client.get(path).status_code == client.head(path).status_code == 200
        assert client.post(path, content=BODY, headers=JSON).status_code == 401
        assert client.options(path).status_code == 401
    assert client.get("/toys/health/").status_code == client.get("/v2/health/live").status_code == 200
    assert client.get("/toys/info").status_code == 401


def test_a_prefix_of_paths(served: Any) -> None:
    """As before a proxy that leaves it, and one that strips it."""
    client = served(root_path="/team/toys")
    for prefix in ("", "/team/toys"):
        assert client.post(f"{prefix}/predict", content=BODY, headers=JSON).status_code == 200
        assert client.post(f"{prefix}/", content=BODY, headers=JSON).status_code == 200
        described = client.get(f"{prefix}/openapi.json").json()
        assert described["servers"] == [{"url": "/team/toys"}]
        assert "/predict" in described["paths"]
        page = client.get(f"{prefix}/docs").text
        for name in ("openapi.json", "static-offline-docs/swagger-ui.css", "static-offline-docs/swagger-ui-bundle.js"):
            assert f"/team/toys/{name}" in page
            assert client.get(f"/team/toys/{name}").status_code == 200
    for path in ("/", "/team/toys", "/team/toys/"):
        page = client.get(path)
        assert '<head>\n<base href="/team/toys/">\n' in page.text
        assert "base-uri 'self'" in page.headers["Content-Security-Policy"]
    assert client.get("/team/toysx/info").status_code == client.get("/team").status_code == 404


def test_prefixes_that_cannot_be_used(bundle: Path) -> None:
    wrongs = ("toys", "/", "/toys/", "/a b", '/"><script>', "/..", "//toys", "/toys?", "/t\u00f6ys", "/v2", "/docs/x")
    for wrong in wrongs:
        with pytest.raises(InvalidOption) as raised:
            Settings(root_path=wrong)
        assert raised.value.field == "root_path"
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1)))
    own = {path.split("/")[1] for path in create_app(service).api.openapi()["paths"]} - {""}
    service.close()
    assert own | {"docs", "openapi.json", "static-offline-docs"} == set(OWN_PATHS)


def test_every_metric_has_a_row_in_the_reference() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "http.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `cascade_")]
    for metric in Metrics().measured().metrics:
        if metric.name.startswith("cascade_"):
            name = metric.name + ("_total" if metric.type == "counter" else "")
            short = "`" + name.removeprefix("cascade") + "`"
            assert any(f"`{name}`" in row or short in row for row in rows), name
