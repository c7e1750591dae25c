"""Errors before a cluster is there."""

from __future__ import annotations

import signal
import sys

import pytest

from cascade_rt import CascadeError, InputError, MissingExtraError
from cascade_rt.cluster import cluster


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cascade-rt\[ray\]'"), cluster():
        pass


def test_nothing_answers_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with (
            pytest.raises(InputError, match=rf"^cannot connect to the cluster {address} \(.*refused"),
            cluster(address),
        ):
            pass
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(CascadeError, match="cannot connect to the cluster 127.0.0.1:1"), cluster():
        pass
    assert signal.getsignal(signal.SIGTERM) is handler
