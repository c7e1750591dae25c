"""Real clients against a real socket: right answers, and refusals that arrive while a body is still being sent."""

from __future__ import annotations

import asyncio
import gc
import gzip
import http.client
import json
import shutil
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.engine.execution import Execution
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings

from .conftest import listening

LIMIT = 100_000
TEXT = "the film was good"
BODY = json.dumps({"inputs": TEXT}).encode()
LARGE = json.dumps({"inputs": "x" * 8_000_000}).encode()
"""More than the buffers of a socket hold."""
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def at(bundle: Path) -> Iterator[str]:
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1), reload_seconds=0, max_body=LIMIT))
    with listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def label(bundle: Path) -> str:
    return CascadeRuntime(bundle, threads=1).predict([TEXT])[0].label


Post = Callable[[str, bytes, Mapping[str, str]], tuple[int, bytes]]
"""Sends a body to a URL; returns the status and the answer."""


def by_http_client(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request("POST", f"/{path}", body, dict(headers))
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def by_http_client_in_chunks(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    connection.request("POST", f"/{path}", parts, dict(headers), encode_chunked=True)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def by_urllib(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, dict(headers)), timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def by_requests(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    requests = pytest.importorskip("requests")
    response = requests.post(url, data=body, headers=dict(headers), timeout=20)
    return response.status_code, response.content


def by_httpx(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    response = httpx.post(url, content=body, headers=headers, timeout=20)
    return response.status_code, response.content


def by_aiohttp(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    aiohttp = pytest.importorskip("aiohttp")

    async def post() -> tuple[int, bytes]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=BytesIO(body), headers=headers) as response,
        ):
            return response.status, await response.read()

    found = asyncio.run(post())
    with warnings.catch_warnings():  # refused bodies are not all sent when the event loop ends: see aiohttp's close()
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return found


def by_curl(*options: str) -> Post:
    def post(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        if (curl := shutil.which("curl")) is None:
            pytest.skip("no curl")
        about = subprocess.run([curl, "--version"], stdout=subprocess.PIPE, check=True).stdout
        if "--http2" in options and b"HTTP2" not in about:
            pytest.skip("curl without HTTP/2")
        named = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
        common = ["-sS", "--max-time", "20", "-w", "\n%{http_code}", "--data-binary", "@-"]
        done = subprocess.run([curl, *common, *named, *options, url], input=body, stdout=subprocess.PIPE, check=True)
        found, _, status = done.stdout.rpartition(b"\n")
        return int(status), found

    return post


CLIENTS = {
    "http.client": by_http_client,
    "http.client in chunks": by_http_client_in_chunks,
    "urllib": by_urllib,
    "requests": by_requests,
    "httpx": by_httpx,
    "aiohttp": by_aiohttp,
    "curl": by_curl(),
    "curl with HTTP/2": by_curl("--http2"),
    "curl with HTTP/2 in chunks": by_curl("--http2", "-H", "Transfer-Encoding: chunked"),
    "curl with HTTP/1.0": by_curl("--http1.0"),
    "curl that waits": by_curl("-H", "Expect: 100-continue"),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_answered(at: str, label: str, client: str) -> None:
    post = CLIENTS[client]
    for path in ("predict", "", "predict/"):
        status, found = post(f"http://{at}/{path}", BODY, JSON)
        assert (status, json.loads(found)[0]["label"]) == (200, label)
    status, found = post(f"http://{at}/predict", gzip.compress(BODY), JSON | {"Content-Encoding": "gzip"})
    assert (status, json.loads(found)[0]["label"]) == (200, label)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_reads_why_its_body_is_refused(at: str, client: str) -> None:
    post = CLIENTS[client]
    for path, expected in (("predict", 413), ("nothing", 404)):
        status, found = post(f"http://{at}/{path}", LARGE, JSON)
        assert status == expected
        assert json.loads(found)["error_type"] in ("too_large", "not_found")


def test_curl_without_a_content_type(at: str, label: str) -> None:
    status, found = by_curl()(f"http://{at}/predict", BODY, {})
    assert (status, json.loads(found)[0]["label"]) == (200, label)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_triton_client_with_compression(at: str, label: str, compression: str) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(at)
    tensor = triton.InferInput("text", (1,), "BYTES")
    for binary in (True, False):
        tensor.set_data_from_numpy(np.array([TEXT.encode()], dtype=object), binary_data=binary)
        found: Any = client.infer(
            "toy", [tensor], request_compression_algorithm=compression, response_compression_algorithm=compression
        )
        assert found.as_numpy("label").tolist() == [label.encode()]
    client.close()


_JAVA = """
import java.net.*;
import java.net.http.*;
import java.io.ByteArrayInputStream;
import java.nio.charset.StandardCharsets;

public class Main {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        URI uri = URI.create(arguments[0]);
        byte[] body = arguments[1].getBytes(StandardCharsets.UTF_8);
        byte[] large = new byte[8_000_000];
        HttpRequest.BodyPublisher[] bodies = {
            HttpRequest.BodyPublishers.ofByteArray(body),
            HttpRequest.BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body)),
            HttpRequest.BodyPublishers.ofByteArray(large),
            HttpRequest.BodyPublishers.ofByteArray(body),
        };
        for (boolean waits : new boolean[] {false, true}) {
            for (HttpRequest.BodyPublisher one : bodies) {
                if (waits && one.contentLength() == large.length) continue;  // before Java 20, it hangs for any refusal
                HttpRequest.Builder request = HttpRequest.newBuilder(uri).header("Content-Type", "application/json");
                HttpRequest made = request.expectContinue(waits).POST(one).build();
                HttpResponse<String> found = client.send(made, HttpResponse.BodyHandlers.ofString());
                System.out.println(found.statusCode() + " " + found.body());
            }
        }
    }
}
"""


def test_java(at: str, label: str, tmp_path: Path) -> None:
    """Its HttpClient offers HTTP/2 with the first request of a connection; that of Spring and Ktor is built on it."""
    if (java := shutil.which("java")) is None or shutil.which("javac") is None:
        pytest.skip("no Java with its compiler")
    (tmp_path / "Main.java").write_text(_JAVA)
    quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"]
    command = [java, *quick, str(tmp_path / "Main.java"), f"http://{at}/predict", BODY.decode()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    rows = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [status for status, _, _ in rows] == ["200", "200", "413", "200", "200", "200", "200"]
    for status, _, found in rows:
        assert status == "413" or json.loads(found)[0]["label"] == label
