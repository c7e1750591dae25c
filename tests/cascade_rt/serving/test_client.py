"""The typed client, blocking and asynchronous."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.serving import AsyncClient, Classification, Client, ServerError

from ...toy import WORDS
from .conftest import Gate

TEXTS = [" ".join(WORDS[at : at + 4]) for at in range(100 % len(WORDS))] * 4


def test_both_clients_answer_as_the_runtime(address: str, bundle: Path) -> None:
    expected = CascadeRuntime(bundle, threads=1).predict(TEXTS)

    async def asynchronous() -> tuple[list[Classification], list[Classification]]:
        async with AsyncClient(f"http://{address}") as client:
            assert (await client.health())["status"] == "ok"
            return await client.classify(TEXTS), [found async for found in client.stream(TEXTS)]

    with Client(f"http://{address}") as client:
        assert client.health()["status"] == "ok"
        found = [client.classify(TEXTS), list(client.stream(TEXTS)), *asyncio.run(asynchronous())]
        assert client.classify(TEXTS[:1], thresholds=1.0)[0].exit == 2
        assert [len(one.steps or ()) for one in client.classify(TEXTS, steps=True)] == [
            one.exit + 1 for one in expected
        ]
        assert client.classify([("the film", "is good")], model="pairs")[0].model == "pairs"
    for answers in found:
        assert [(one.label, one.exit, one.layers) for one in answers] == [
            (one.label, one.exit, one.layers) for one in expected
        ]


def test_errors_are_typed(address: str) -> None:
    async def asynchronous() -> None:
        async with AsyncClient(f"http://{address}") as client:
            with pytest.raises(ServerError, match="no model 'toys'"):
                await client.classify(["a"], model="toys")
            with pytest.raises(ServerError):
                _ = [found async for found in client.stream(["a"], model="toys")]

    asyncio.run(asynchronous())
    with Client(f"http://{address}") as client:
        with pytest.raises(ServerError) as raised:
            client.classify(["a", 3])  # type: ignore[list-item]
        assert (raised.value.status, raised.value.kind, raised.value.field) == (422, "validation", "texts.1")
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (str(copy), copy.field) == (str(raised.value), "texts.1")
        with pytest.raises(ServerError):
            list(client.stream(["a"], model="toys"))
        with pytest.raises(ServerError) as late:
            client.classify(TEXTS, deadline_ms=1)
        assert late.value.status == 504


@pytest.mark.parametrize("retries", [0, 5])
def test_a_full_server_is_asked_again(served: Callable[..., httpx.Client], gate: Gate, retries: int) -> None:
    server = served(max_queue=2)
    gate.close()
    first = threading.Thread(target=lambda: server.post("/v1/classify", json={"texts": ["a"] * 2}))
    first.start()
    gate.wait_for_run()
    threading.Timer(0.5, gate.opened.set).start()
    with Client(str(server.base_url), retries=retries) as client:
        if retries:
            assert len(client.classify(["b"])) == 1
        else:
            with pytest.raises(ServerError) as raised:
                client.classify(["b"])
            assert (raised.value.status, raised.value.kind) == (503, "overloaded")
            assert (raised.value.retry_after or 0) >= 1
    gate.opened.set()
    first.join()


def test_a_token_is_sent(served: Callable[..., httpx.Client]) -> None:
    server = served(token="secret")
    with Client(str(server.base_url), token="secret") as client:
        assert len(client.classify(["a"])) == 1
    with Client(str(server.base_url)) as client, pytest.raises(ServerError, match="bearer"):
        client.classify(["a"])
