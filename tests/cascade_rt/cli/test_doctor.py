"""`cascade-rt doctor`: what a machine has, and what is slow on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cascade_rt.cli import doctor, main


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_it_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys)["packages"]["onnxruntime"] == onnxruntime.__version__
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert onnxruntime.__version__ in shown
    assert "CPUExecutionProvider" in shown
    assert "telemetry     off" in shown


@pytest.mark.parametrize(
    ("what", "value", "advice"),
    [
        ("int8_saturates", lambda: True, "int8: without VNNI"),
        ("cgroup_quota", lambda: 0.5, "threads: a control group allows 0.5 CPUs"),
        ("available_memory", lambda: 200 * 10**6, "memory: 200 MB"),
        ("_writable", lambda folder: False, "start: "),
    ],
)
def test_what_is_slow_is_named(
    what: str, value: Any, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "members_folder", lambda cache: Path("members"))
    monkeypatch.setattr(doctor, what, value)
    assert any(line.startswith(advice) for line in found(capsys)["advice"])


@pytest.mark.parametrize(
    ("processor", "emulated"),
    [
        ("old (avx2)", True),
        ("new (avx2 avx512_bf16)", False),
        ("arm (asimddp bf16)", False),
        ("unknown", False),
        ("Intel(R) Core(TM) i7", False),
    ],
)
def test_bfloat16_is_emulated_where_the_cpu_has_none(
    processor: str, emulated: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"processor": processor, "packages": {"torch": "2"}, "usable_cpus": 1, "system": ""}
    monkeypatch.setattr(doctor, "describe", lambda: described)
    assert any("--bf16" in line for line in found(capsys)["advice"]) == emulated


def test_nothing_is_said_of_a_machine_without_faults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for what, value in (
        ("int8_saturates", lambda: False),
        ("cgroup_quota", lambda: None),
        ("available_memory", lambda: None),
        ("members_folder", lambda cache: tmp_path / "members"),
    ):
        monkeypatch.setattr(doctor, what, value)
    monkeypatch.setattr(doctor, "describe", lambda: {"processor": "", "packages": {}, "usable_cpus": 1, "system": ""})
    assert found(capsys)["advice"] == []
    assert main(["doctor"]) == 0
    assert "found nothing" in capsys.readouterr().out
