"""Run commands in this process, and what they should answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main

SENTENCES = ["a good film", "a bad , bad film", "the cat sat on the mat", "so sad", "not very witty but lovely"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")], captured.err


def predictions(bundle: Path, texts: list[Any]) -> list[dict[str, Any]]:
    names = ("label", "score", "exit", "layers", "truncated")
    return [{name: getattr(row, name) for name in names} for row in CascadeRuntime(bundle).predict(texts)]


def close(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return [{**row, "score": pytest.approx(row["score"], abs=1e-5)} for row in wanted] == got
