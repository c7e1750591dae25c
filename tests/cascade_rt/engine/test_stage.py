"""A stage that fails says which member, on what, why, and what to do about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cascade_rt import BundleError, CascadeRuntime, InferenceError
from cascade_rt.errors import CascadeError


class Answering:
    """Stands in for a session: answers with fixed logits, or raises."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def run(self, _: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return [self._answer(len(feeds["input_ids"]))]


def standing_in(bundle: Path, answer: Any) -> CascadeRuntime:
    """Return a runtime whose first member answers with `answer(rows)`, or raises it."""
    runtime = CascadeRuntime(bundle)
    runtime.plan.stages[0].load()
    runtime.plan.stages[0]._sessions[False] = Answering(answer)
    return runtime


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bundle: Path, value: float) -> None:
    def answer(rows: int) -> np.ndarray:
        logits = np.zeros((rows, 3), dtype=np.float32)
        logits[-1, 1] = value
        return logits

    runtime = standing_in(bundle, answer)
    for texts in (["a film"], ["a film", "a cat"]):
        with pytest.raises(InferenceError, match="'tiny' answered NaN or infinity"):
            runtime.predict(texts)


@pytest.mark.parametrize(("kind", "value"), [(np.float16, 300), (np.float16, 65_504), (np.float32, 1e30)])
def test_large_logits_are_answered(bundle: Path, kind: type, value: float) -> None:
    runtime = standing_in(bundle, lambda rows: np.array([[0, value, 0]] * rows, dtype=kind))
    for texts in (["a film"], ["a film", "a cat"]):
        assert [(answer.label, answer.score) for answer in runtime.predict(texts)] == [("fine", 1.0)] * len(texts)


def test_logits_of_a_wrong_shape_are_refused(bundle: Path) -> None:
    runtime = standing_in(bundle, lambda rows: np.zeros((rows, 4), dtype=np.float32))
    with pytest.raises(BundleError, match=r"'tiny' answered logits of shape \(2, 4\), expected \(2, 3\)"):
        runtime.predict(["a film", "a cat"])


@pytest.mark.parametrize(("texts", "batch"), [(["a film"], "1 text"), (["a film", "a cat"], "2 texts")])
def test_a_run_that_fails_is_an_inference_error_with_its_cause(bundle: Path, texts: list[str], batch: str) -> None:
    failure = RuntimeError("node Gather_3: index out of bounds\nand a stack of ten lines")
    with pytest.raises(InferenceError) as caught:
        standing_in(bundle, failure).predict(texts)
    assert caught.value.__cause__ is failure
    message = str(caught.value)
    assert f"member 'tiny' failed on {batch} of 4 tokens (node Gather_3: index out of bounds)" in message
    assert "memory" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 1638400000"),
        RuntimeError("bfc_arena.cc:376 Available memory of 0 is smaller than requested bytes of 20480"),
        RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=box"),
        RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"),
    ],
)
def test_out_of_memory_has_its_own_remedy(bundle: Path, failure: Exception) -> None:
    with pytest.raises(InferenceError) as caught:
        standing_in(bundle, failure).predict(["a film", "a cat"])
    assert caught.value.__cause__ is failure
    message = str(caught.value)
    assert "member 'tiny' ran out of memory on 2 texts of 4 tokens" in message
    assert "free memory" in message
    assert "export again" not in message


def test_out_of_memory_while_a_member_is_loaded_does_not_ask_for_another_export(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"
        )

    runtime = CascadeRuntime(bundle)
    monkeypatch.setattr(onnxruntime, "InferenceSession", full)
    with pytest.raises(CascadeError, match="memory") as caught:
        runtime.predict(["a film"])
    assert "export again" not in str(caught.value)
    assert isinstance(caught.value, InferenceError), "the bundle is not at fault"


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's limits of memory")
def test_a_process_that_is_really_out_of_memory_says_so_and_goes_on(bundle: Path) -> None:
    code = (
        "import resource, numpy as np\n"
        "from cascade_rt import CascadeRuntime, InferenceError\n"
        f"runtime = CascadeRuntime({str(bundle)!r}, threads=1, preload=True)\n"
        "before = runtime.predict(['a film'])\n"
        "ids = np.ones((400_000, 32), dtype=np.int64)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)\n"
        "try:\n"
        "    runtime.plan.stages[2].run({'input_ids': ids, 'attention_mask': ids, 'token_type_ids': ids * 0})\n"
        "except InferenceError as error:\n"
        "    print(error)\n"
        "assert runtime.predict(['a film']) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "member 'big' ran out of memory on 400000 texts of 32 tokens" in done.stdout


def test_a_file_that_cannot_be_loaded_is_a_bundle_error_with_its_cause(copied: Path) -> None:
    runtime = CascadeRuntime(copied, verify=False)
    stage = runtime.plan.stages[0]
    stage._path = copied / "tokenizer.json"
    stage._identities = []
    with pytest.raises(BundleError, match="replaced since the bundle was opened"):
        stage.load()
    stage._identities = stage._found()
    with pytest.raises(
        BundleError, match=r"tokenizer\.json: ONNX Runtime cannot load it \(.*\); export again"
    ) as caught:
        stage.load()
    assert caught.value.__cause__ is not None
    assert not stage.loaded
