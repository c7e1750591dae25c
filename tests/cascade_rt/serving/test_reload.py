"""A bundle that is replaced on disk while it is served."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.bundle import MANIFEST, write_bundle

from ...toy import WORDS, write_cascade

TEXTS = [" ".join(WORDS[at : at + 6]) for at in range(30)]
Served = Callable[..., httpx.Client]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    return [write_cascade(root / f"source-{number}", shift=10 * number) for number in range(2)]


def replace(target: Path, source: Path) -> None:
    with write_bundle(target, overwrite=True) as fresh:
        shutil.copytree(source, fresh, dirs_exist_ok=True)


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_answer_is_wrong_while_bundles_are_replaced(served: Served, sources: list[Path], tmp_path: Path) -> None:
    """10 replacements under load: every answer is that of the bundle whose version it names, and none fails."""
    bundle = shutil.copytree(sources[0], tmp_path / "bundle")
    runtimes = [CascadeRuntime(source, threads=1) for source in sources]
    expected = {
        (runtime.bundle.sha256 or "")[:12]: [(one.label, one.exit) for one in runtime.predict(TEXTS)]
        for runtime in runtimes
    }
    assert len(set(map(str, expected.values()))) == 2
    client = served({"toy": str(bundle)}, reload_seconds=0.02)
    seen: list[str] = []
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            body = client.post("/v1/classify", json={"texts": TEXTS}).raise_for_status().json()
            assert [(row["label"], row["exit"]) for row in body["predictions"]] == expected[body["version"]]
            seen.append(body["version"])

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            ask()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(10):
        replace(bundle, sources[(number + 1) % 2])
        version = (runtimes[(number + 1) % 2].bundle.sha256 or "")[:12]
        wait_until(lambda version=version: client.get("/health").json()["models"]["toy"]["version"] == version)  # type: ignore[misc]
    stopped.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(seen) == set(expected)
    assert 'cascade_reloads_total{model="toy",result="replaced"} 10.0' in client.get("/metrics").text


def test_a_broken_bundle_is_refused_and_the_old_one_answers(
    served: Served, sources: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = shutil.copytree(sources[0], tmp_path / "bundle")
    client = served({"toy": str(bundle)}, reload_seconds=0.02)
    model: Callable[[], Any] = lambda: client.get("/health").json()["models"]["toy"]  # noqa: E731
    before = model()["version"]
    manifest = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(manifest[:-30])
    wait_until(lambda: model()["error"] is not None)
    assert str(bundle / MANIFEST) in model()["error"]
    assert client.get("/health").status_code == 200
    answer = client.post("/v1/classify", json={"texts": TEXTS}).json()
    assert answer["version"] == before
    assert 'cascade_reloads_total{model="toy",result="refused"} 1.0' in client.get("/metrics").text
    replace_damaged(bundle, sources[1])
    wait_until(lambda: model()["error"] is None)
    assert model()["version"] != before
    assert client.post("/v1/classify", json={"texts": TEXTS}).json()["version"] == model()["version"]
    assert any(row.message == "reload refused" for row in caplog.records)


def replace_damaged(bundle: Path, source: Path) -> None:
    """Copy file by file, the manifest first, as someone with `cp` would."""
    for path in sorted(source.iterdir(), key=lambda path: path.name != MANIFEST):
        shutil.copy(path, bundle / path.name)
        time.sleep(0.05)


def test_an_unexpected_error_does_not_end_reloading(
    served: Served, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(sources[0], tmp_path / "bundle")
    client = served({"toy": str(bundle)}, reload_seconds=0.02)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(bundle / MANIFEST))

    with monkeypatch.context() as patch:
        patch.setattr("cascade_rt.CascadeRuntime.__init__", refuse)
        replace(bundle, sources[1])
        wait_until(lambda: "Permission denied" in str(client.get("/health").json()["models"]["toy"]["error"]))
    wait_until(lambda: client.get("/health").json()["models"]["toy"]["error"] is None)
    assert client.post("/v1/classify", json={"texts": TEXTS}).status_code == 200


def test_a_bundle_that_vanishes(served: Served, sources: list[Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(sources[0], tmp_path / "bundle")
    client = served({"toy": str(bundle)}, reload_seconds=0.02)
    shutil.rmtree(bundle)
    wait_until(lambda: client.get("/health").json()["models"]["toy"]["error"] is not None)
    assert client.post("/v1/classify", json={"texts": TEXTS}).status_code == 200
