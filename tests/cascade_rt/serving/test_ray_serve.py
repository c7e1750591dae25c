"""`cascade-rt serve --engine ray`: answers as the server on one machine does, also while replicas die."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.bundle import MANIFEST
from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Scaling, Settings

from ...toy import WORDS, write_cascade
from .conftest import listening
from .test_command import serving
from .test_protocols import TEXTS
from .test_reload import replace
from .test_workers import eventually

pytest.importorskip("ray.serve", exc_type=ImportError)
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # when Ray is imported
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes as Linux shows them"),
]

TOKEN = {"Authorization": "Bearer secret"}
LONG = "film " * 300


@contextmanager
def serving_on_ray(bundles: dict[str, Path], folder: Path) -> Iterator[tuple[Any, str]]:
    """Start the command with some bundles; yield its process and its address."""
    token = folder / "token"
    token.write_text("secret\n")
    options = [option for name, bundle in bundles.items() for option in ("--model", f"{name}={bundle}")]
    options += ["--token-file", str(token)]
    options += ["--allow-thresholds", "--max-texts", "2000", "--max-queue", "5000", "--max-body-mb", "1"]
    options += ["--cors-origin", "https://page.example", "--root-path", "/toys"]
    options += ["--engine", "ray", "--address", "local"]
    options += ["--min-replicas", "2", "--max-replicas", "2", "--reload-seconds", "0.2"]
    with serving(*options) as running:
        process, address = running
        assert process.stderr is not None
        assert [process.stderr.readline() for _ in range(len(bundles) + 2)][-2:] == [
            "on Ray: 2 replicas with 1 thread each\n",
            f"serving on {address}, interfaces at /toys/docs\n",
        ]
        yield running
        process.terminate()  # a process that is killed leaves some of Ray's behind
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=300)


@pytest.fixture(scope="module")
def bundles(bundle: Path, pair_bundle: Path, two_segments: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """All that is served, by name; `toy` may be replaced."""
    toy = shutil.copytree(bundle, tmp_path_factory.mktemp("toy") / "toy")
    return {"toy": toy, "pairs": pair_bundle, "exits": two_segments}


@pytest.fixture(scope="module")
def on_ray(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A server for all tests that do not end it."""
    with serving_on_ray(bundles, tmp_path_factory.mktemp("token")) as running:
        yield running


@pytest.fixture(scope="module")
def local(bundles: dict[str, Path]) -> Iterator[str]:
    """A server in this process with the same settings."""
    settings = Settings(
        execution=Execution(threads=1),
        reload_seconds=0,
        allow_thresholds=True,
        max_texts=2000,
        max_queue=5000,
        max_body=2**20,
        root_path="/toys",
    )
    service = Service({name: str(bundle) for name, bundle in bundles.items()}, settings)
    with listening(service, token="secret", cors_origins=("https://page.example",)) as address:
        yield f"http://{address}"


@pytest.fixture
def client(on_ray: tuple[Any, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=on_ray[1], headers=TOKEN, timeout=60) as found:
        yield found


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    with suppress(OSError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [found for child in children for found in (child, *descendants(child))]
    return []


def title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    return ""


def replicas(pid: int) -> list[int]:
    return [found for found in descendants(pid) if title(found) == "ray::ServeReplica:cascade-rt:server"]


def tensor(*texts: str, name: str = "text") -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}


REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/classify", {"texts": TEXTS[:1]}),
    ("POST", "/v1/classify", {"texts": TEXTS, "steps": True}),
    ("POST", "/v1/classify", {"texts": ["", LONG, "the film"]}),
    ("POST", "/v1/classify", {"texts": TEXTS, "thresholds": 1.0, "steps": True}),
    ("POST", "/v1/classify", {"texts": TEXTS, "thresholds": [0.9, 0.3]}),
    ("POST", "/v1/classify", {"model": "pairs", "texts": [["the film", "a dog"], ["no", "yes"]], "steps": True}),
    ("POST", "/v1/classify", {"model": "exits", "texts": TEXTS, "steps": True}),
    ("POST", "/v1/classify", {"texts": TEXTS, "thresholds": [0.9]}),
    ("POST", "/v1/classify", {"texts": TEXTS, "thresholds": 2}),
    ("POST", "/v1/classify", {"texts": []}),
    ("POST", "/v1/classify", {"texts": ["a"] * 2001}),
    ("POST", "/v1/classify", {"texts": [["a", "b"]]}),
    ("POST", "/v1/classify", {"texts": ["a"], "colour": 3}),
    ("POST", "/v1/classify", {"texts": ["\ud800"]}),
    ("POST", "/v1/classify", {"model": "none", "texts": ["a"]}),
    ("POST", "/v1/classify", {"texts": ["x" * 2**20]}),
    ("POST", "/v1/classify", b"{"),
    ("GET", "/v1/classify", None),
    ("POST", "/models/toy", {"inputs": TEXTS[0]}),
    ("POST", "/models/toy", {"inputs": TEXTS, "parameters": {"top_k": 2, "function_to_apply": "none"}}),
    ("POST", "/models/toy", {"inputs": "a", "parameters": {"top_k": 0}}),
    ("POST", "/models/none", {"inputs": "a"}),
    ("POST", "/models/pairs", {"inputs": "a"}),
    ("POST", "/predict", {"inputs": TEXTS[0]}),
    ("POST", "/predict", {"inputs": [[text] for text in TEXTS], "raw_scores": True}),
    ("POST", "/predict", {"inputs": LONG, "truncate": False}),
    ("POST", "/predict", {"inputs": []}),
    ("POST", "/", {"inputs": TEXTS[0], "truncate": None}),
    ("POST", "/toys/predict/", {"inputs": [[text] for text in TEXTS]}),
    ("PUT", "/toys/predict", b"x" * 3_000_000),
    ("GET", "/info", None),
    ("GET", "/toys", None),
    ("GET", "/toys/openapi.json", None),
    ("GET", "/v2", None),
    ("GET", "/v2/models/toy", None),
    ("GET", "/v2/models/none", None),
    ("GET", "/v2/models/pairs/ready", None),
    ("GET", "/v2/health/ready", None),
    ("POST", "/v2/models/toy/infer", {"inputs": [tensor(*TEXTS)], "id": "seven"}),
    ("POST", "/v2/models/pairs/infer", {"inputs": [tensor("a"), tensor("b", name="text_pair")]}),
    ("POST", "/v2/models/toy/infer", {"inputs": [tensor("a", name="ids")]}),
    ("GET", "/", None),
    ("GET", "/docs", None),
    ("GET", "/openapi.json", None),
    ("GET", "/health", None),
    ("HEAD", "/health", None),
    ("GET", "/nothing", None),
    ("OPTIONS", "/v1/classify", None),
]


def asked(client: httpx.Client, method: str, path: str, body: Any, headers: dict[str, str]) -> Any:
    """Status, body and headers of a response, without what tells the time."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    found = client.request(method, path, content=content, headers=headers | {"Content-Type": "application/json"})
    kept = [f"{name}: {value}" for name, value in found.headers.multi_items() if name not in _NOT_COMPARED]
    return found.status_code, re.sub(rb'"loaded":"[^"]+"', b"", found.content), sorted(kept)


_NOT_COMPARED = {"date", "server", "x-request-id", "content-length"}


def test_every_interface_answers_as_on_one_machine(client: httpx.Client, local: str) -> None:
    statuses = set()
    client.headers.clear()
    with httpx.Client(base_url=local, headers={}, timeout=60) as other:
        other.headers.clear()
        for method, path, body in REQUESTS:
            for headers in (TOKEN, {}, TOKEN | {"X-Deadline-Ms": "x"}, TOKEN | {"Accept": "application/x-ndjson"}):
                expected = asked(other, method, path, body, headers)
                assert asked(client, method, path, body, headers) == expected, (method, path, body, headers)
                statuses.add(expected[0])
        for origin in ("https://page.example", "https://other.example"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            expected = asked(other, "OPTIONS", "/v1/classify", None, headers)
            assert asked(client, "OPTIONS", "/v1/classify", None, headers) == expected
            assert any("access-control-allow-origin" in header for header in expected[2]) is ("page" in origin)
    assert statuses == {200, 204, 400, 401, 404, 405, 413, 422}


def test_a_request_id_is_the_clients(client: httpx.Client) -> None:
    assert client.get("/health", headers={"X-Request-ID": "seven"}).headers.get_list("x-request-id") == ["seven"]


def counted(client: httpx.Client, name: str) -> dict[str, float]:
    """A metric of the first bundle, by member."""
    text = client.get("/metrics").text
    rows = re.findall(rf'^{name}{{member="(\w+)",model="toy".*}} (\S+)', text, re.MULTILINE)
    found: Counter[str] = Counter()
    for member, value in rows:  # of each replica
        found[member] += float(value)  # type: ignore[assignment]
    return dict(found)


def test_answers_are_those_of_predict_and_metrics_count_them(client: httpx.Client, bundle: Path) -> None:
    """100 requests of all sizes from 8 threads."""
    draw = random.Random(0)
    texts = ["", LONG, *(" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(300))]
    requests = [draw.choices(texts, k=draw.choice([1, 1, 2, 5, 40, 300])) for _ in range(100)]
    before = [counted(client, name) for name in ("cascade_texts_total", "cascade_batch_texts_sum")]

    def ask(some: list[str]) -> list[dict[str, Any]]:
        found = client.post("/v1/classify", json={"texts": some})
        found.raise_for_status()
        rows: list[dict[str, Any]] = found.json()["predictions"]
        return rows

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, requests))
    assert_predicted(found, requests, bundle)

    exits = [row["exit"] for rows in found for row in rows]
    after = [counted(client, name) for name in ("cascade_texts_total", "cascade_batch_texts_sum")]
    answered, run = (
        {name: new[name] - old.get(name, 0) for name in new} for old, new in zip(before, after, strict=True)
    )
    for at, member in enumerate(("tiny", "small", "big")):
        assert answered[member] == exits.count(at)
        assert run[member] == sum(exit >= at for exit in exits), "each replica's micro-batches are counted once"
    assert set(counted(client, "cascade_queue_texts").values()) == {0.0}
    batches = counted(client, "cascade_batch_texts_count")
    assert batches["tiny"] < len(exits), "texts run together"


def assert_predicted(found: list[list[dict[str, Any]]], requests: list[list[str]], bundle: Path) -> None:
    with CascadeRuntime(bundle, threads=1) as runtime:
        for rows, some in zip(found, requests, strict=True):
            for row, expected in zip(rows, runtime.predict(some), strict=True):
                assert (row["label"], row["exit"], row["truncated"]) == (
                    expected.label,
                    expected.exit,
                    expected.truncated,
                )
                assert list(row["probabilities"].values()) == pytest.approx(expected.probabilities, abs=1e-5)


def test_a_replica_that_dies_loses_only_what_it_was_answering(
    on_ray: tuple[Any, str], client: httpx.Client, bundle: Path
) -> None:
    process, _ = on_ray
    draw = random.Random(1)
    killed = threading.Event()
    before = replicas(process.pid)
    doomed = before[0]
    lost: list[int] = []

    def ask(client_id: int) -> list[tuple[list[str], list[dict[str, Any]]]]:
        """Ask without a pause, until some time after the replica was killed."""
        found, last = [], 10
        while last:
            last -= killed.is_set()
            some = [" ".join(draw.choices(WORDS, k=20)) for _ in range(200)]
            response = client.post("/v1/classify", json={"texts": some, "thresholds": 0.8})
            if response.status_code == 200:
                found.append((some, response.json()["predictions"]))
            else:
                lost.append(client_id)
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = pool.map(ask, range(4))
        time.sleep(0.5)
        os.kill(doomed, signal.SIGKILL)
        eventually("another replica", lambda: not set(replicas(process.pid)) <= set(before))
        killed.set()
        answers = [answer for answers in asking for answer in answers]
    assert_predicted([rows for _, rows in answers], [some for some, _ in answers], bundle)
    assert len(lost) == len(set(lost)), "a client has one request under way"


def test_a_replaced_bundle_is_opened_by_every_replica_and_no_request_fails(
    client: httpx.Client, bundles: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    other = write_cascade(tmp_path / "other", shift=10)
    stopped = threading.Event()

    def ask() -> set[int]:
        statuses = set()
        while not stopped.is_set():
            statuses.add(client.post("/v1/classify", json={"texts": TEXTS}).status_code)
        return statuses

    def served() -> list[str]:
        """The version that each replica serves."""
        text = client.get("/metrics").text
        return re.findall(r'^cascade_model{model="toy",.*version="(\w+)"} 1', text, re.MULTILINE)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        for source in (other, bundle):
            replace(bundles["toy"], source)
            version = (read_bundle(source).sha256 or "")[:12]
            eventually("both replicas serve it", lambda version=version: served() == [version] * 2)  # type: ignore[misc]
        stopped.set()
        assert [found.result() for found in asking] == [{200}, {200}]
    (bundles["toy"] / MANIFEST).write_text("{}")
    eventually("the error", lambda: MANIFEST in str(client.get("/health").json()["models"]["toy"]["error"]))
    replace(bundles["toy"], bundle)
    eventually("no error", lambda: not any(client.get("/health").json()["models"]["toy"]["error"] for _ in range(8)))


def test_a_second_server_on_the_cluster_is_refused(on_ray: tuple[Any, str], client: httpx.Client, bundle: Path) -> None:
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(on_ray[0].pid)]
    (address,) = set(re.findall(r"--gcs-address=([\d.]+:\d+)", "\n".join(commands)))
    command = [sys.executable, "-m", "cascade_rt", "serve", "--engine", "ray", "--address", address, "--port", "0"]
    refused = subprocess.run(
        [*command, "--model-dir", str(bundle)],
        env=os.environ | {"RAY_AUTH_MODE": "token"},  # clusters that `ray.init` starts ask for one
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "found Ray Serve at work on this cluster" in refused.stderr
    assert "name the address of another cluster" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert client.get("/health").status_code == 200


def test_a_signal_lets_open_requests_finish_and_ends_the_cluster(bundle: Path, tmp_path: Path) -> None:
    with (
        serving_on_ray({"toy": bundle}, tmp_path) as (process, address),
        httpx.Client(base_url=address, headers=TOKEN, timeout=60) as client,
    ):
        started = descendants(process.pid)
        assert any("raylet" in title(pid) for pid in started)
        request = {"texts": ["good"] * 12_000}  # some seconds, 64 texts at a time
        with client.stream(
            "POST", "/v1/classify", json=request, headers={"Accept": "application/x-ndjson"}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            eventually("the server is draining", lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/classify", json={"texts": ["the film"]})
            health = client.get("/health")
            assert len(list(lines)) == 11_999
        assert (refused.json()["error_type"], refused.headers["Retry-After"]) == ("overloaded", "1")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == "", "nothing but what it said at first"
        eventually("all processes end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers: found 2, expected 1 with --engine ray"),
        (["--min-replicas", "0"], "--min-replicas: found 0, expected at least 1"),
        (["--min-replicas", "3", "--max-replicas", "2"], "--max-replicas: found 2, expected at least 3"),
        (["--target-requests", "0"], "--target-requests: found 0, expected a number above 0"),
        (["--threads", "0"], "--threads: found 0"),
        (["--address", "127.0.0.1:9"], "check the address"),
        (["--engine", "local", "--address", "auto"], "--address: found 'auto', expected none without --engine ray"),
        (["--engine", "local", "--max-replicas", "2"], "--max-replicas: found 2, expected none without --engine ray"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    message: str,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cascade_rt.serving.ray_serve._deploy", lambda *args: pytest.fail("it serves"))
    monkeypatch.setattr("cascade_rt.serving.server.Setup.open", lambda *args: pytest.fail("it serves"))
    engine = [] if "--engine" in options else ["--engine", "ray"]
    assert main(["serve", "--model-dir", str(bundle), "--port", "0", *engine, *options]) == 2
    assert message in capsys.readouterr().err


def test_ray_that_is_not_installed(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cascade_rt.serving.ray_serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--model-dir", str(bundle), "--port", "0", "--engine", "ray"]) == 2
    assert "pip install 'cascade-rt[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "settings", "scaling", "expected"),
    [
        ({"CPU": 16.0}, {}, {}, (1, 0, 1, 16)),
        ({"CPU": 16.0}, {"threads": 3}, {}, (3, 0, 1, 5)),
        ({"CPU": 16.0}, {"threads": 2}, {"max_replicas": 2}, (2, 0, 1, 2)),
        ({"CPU": 16.0}, {}, {"min_replicas": 3}, (1, 0, 3, 16)),
        ({"CPU": 2.0}, {}, {"min_replicas": 4}, (0.5, 0, 4, 4)),
        ({"CPU": 12.0}, {"threads": 16}, {}, (12, 0, 1, 1)),
        ({}, {}, {}, (0, 0, 1, 1)),
        ({"CPU": 16.0, "GPU": 8.0}, {"provider": "cuda"}, {}, (0, 1, 1, 8)),
        ({"CPU": 16.0, "GPU": 1.0}, {"provider": "cuda"}, {"min_replicas": 3}, (0, 0.33, 3, 3)),
        ({"CPU": 2.0, "GPU": 4.0}, {"provider": "TensorrtExecutionProvider"}, {}, (0, 1, 1, 4)),
    ],
)
def test_replicas_find_room(
    cluster: dict[str, float],
    settings: dict[str, Any],
    scaling: dict[str, Any],
    expected: tuple[float, float, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cascade_rt.serving import ray_serve

    monkeypatch.setattr(ray_serve, "cluster_resources", lambda: cluster)
    plan = ray_serve._Plan.of(Execution(**settings), Scaling(**scaling))
    assert (plan.cpus, plan.gpus, plan.least, plan.most) == expected
    assert plan.least * plan.cpus <= cluster.get("CPU", 0)
    for value in (plan.cpus, plan.gpus):
        assert value < 1 or value == int(value), "what Ray takes"


def test_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade_rt.serving import ray_serve

    monkeypatch.setattr(ray_serve, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(Exception, match="the cluster has no GPU"):
        ray_serve._Plan.of(Execution("cuda"), Scaling())
