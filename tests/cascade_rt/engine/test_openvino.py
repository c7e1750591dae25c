"""OpenVINO as the engine: the answers of ONNX Runtime, in the same order, from several threads, and clear errors."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import BundleError, CascadeRuntime, InferenceError, InvalidOption, Prediction
from cascade_rt.bundle import MemberEntry
from cascade_rt.cli import main
from cascade_rt.engine import providers
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage

from ...toy import WORDS
from ..forks import check_a_fork

pytest.importorskip("openvino", reason="the extra openvino is not installed")

_DRAW = random.Random(0)
TEXTS = ["", *(" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(1, 45))) for _ in range(150))]  # several micro-batches


def check_equal(found: list[Prediction], expected: list[Prediction], tolerance: float = 1e-5) -> None:
    assert [answer.exit for answer in found] == [answer.exit for answer in expected]
    for answer, other in zip(found, expected, strict=True):
        assert answer.probabilities == pytest.approx(other.probabilities, abs=tolerance)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["bundle", "four_segments"])
def test_answers_are_those_of_onnx_runtime(name: str, threads: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    runtime = CascadeRuntime(folder, provider="openvino", threads=threads)
    expected = CascadeRuntime(folder).predict(TEXTS)
    assert len({answer.exit for answer in expected}) > 1
    check_equal(runtime.predict(TEXTS), expected)
    check_equal([runtime.predict([text])[0] for text in TEXTS[:30]], expected[:30])


def test_pairs_and_threads_that_share_a_runtime(pair_bundle: Path) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    expected = CascadeRuntime(pair_bundle).predict(pairs)
    runtime = CascadeRuntime(pair_bundle, provider="openvino", threads=2)
    calls = [(start, size) for size in (1, 7, 60) for start in range(0, len(pairs), 25)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: runtime.predict(pairs[call[0] : call[0] + call[1]]), calls))
    for (start, size), answers in zip(calls, found, strict=True):
        check_equal(answers, expected[start : start + size])


def test_a_run_that_fails_names_the_member_and_its_batch(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CascadeRuntime(bundle, provider="openvino", threads=2)

    def fail(*_: Any) -> Any:
        raise RuntimeError("Exception from src/inference.cpp:9:\nshapes do not fit\n")

    monkeypatch.setattr("cascade_rt.engine.openvino._outputs", fail)
    for texts in (["a film"], TEXTS):
        with pytest.raises(InferenceError, match=r"'tiny' failed on \d+ texts? of \d+ tokens \(shapes do not fit\)"):
            runtime.predict(texts)


@pytest.mark.parametrize("option", ["NOPE=1", "INFERENCE_PRECISION_HINT=f7"])
def test_properties_that_openvino_does_not_have(bundle: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    key, _, value = option.partition("=")
    with pytest.raises(InvalidOption, match=f"`provider_options`: found .*{key}.*expected properties of OpenVINO"):
        CascadeRuntime(bundle, provider="openvino", provider_options={key: value}).predict(["a film"])
    command = ["predict", "--model-dir", str(bundle), "--provider", "openvino", "--provider-option", option, "a film"]
    assert main(command) == 2
    assert "--provider-option" in capsys.readouterr().err


def test_the_command_answers(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--provider", "OpenVINO", "--provider-option", "INFERENCE_PRECISION_HINT=f32"]
    assert main(["predict", "--model-dir", str(bundle), *options, "a film"]) == 0
    (expected,) = CascadeRuntime(bundle).predict(["a film"])
    assert json.loads(capsys.readouterr().out)["label"] == expected.label


def test_what_it_cannot_run_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MemberEntry("small", "small.onnx", "", 2, 32, 1, "int8", None)
    with pytest.raises(InvalidOption, match="that can run the int8 products of member 'small'.* precision int8-static"):
        Stage(entry, copied / "small.onnx", 3, Execution(providers.OPENVINO, 1))
    stage = Stage(replace(entry, precision="fp32"), copied / "small.onnx", 3, Execution(providers.OPENVINO, 1))
    (copied / "small.onnx").write_bytes(b"not a graph")
    stage._identities = stage._found()
    with pytest.raises(BundleError, match=r"small\.onnx: OpenVINO cannot load it .*use the provider cpu"):
        stage.load()
    monkeypatch.setattr(providers, "find_spec", lambda _: None)
    with pytest.raises(InvalidOption, match=r"`provider`: found 'openvino'.*pip install 'cascade-rt\[openvino\]'"):
        CascadeRuntime(copied, provider="openvino")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_answers_too(bundle: Path) -> None:
    check_a_fork(bundle, TEXTS, "openvino")


def test_no_telemetry_is_loaded(bundle: Path) -> None:
    program = (
        "import sys, threading\n"
        "from cascade_rt import CascadeRuntime\n"
        f"CascadeRuntime({str(bundle)!r}, provider='openvino', threads=1).predict(['a film'])\n"
        "assert 'openvino' in sys.modules\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')], threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]


def test_signals_are_handled_after_runtimes_were_closed(bundle: Path) -> None:
    program = (
        "import gc, signal\n"
        "from cascade_rt import CascadeRuntime\n"
        f"runtimes = [CascadeRuntime({str(bundle)!r}, provider='openvino', threads=2) for _ in range(2)]\n"
        "for runtime in runtimes:\n"
        "    runtime.predict(['a film'] * 40)\n"
        "while runtimes:\n"
        "    runtimes.pop(0).close()\n"
        "del runtime\n"
        "gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
