"""Execution providers: none falls back silently, and none gets a precision that it cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cascade_rt import CascadeError, CascadeRuntime, InputError
from cascade_rt.bundle import MemberEntry
from cascade_rt.bundle.precisions import PRECISIONS, Precision
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.providers import CPU, CUDA, OPENVINO, check_precision, instead_of, needs_gpu
from cascade_rt.engine.stage import Stage
from cascade_rt.errors import BundleError, InvalidOption

TEXTS = ["a great film", "so sad", "the cat sat on the mat and that was not very witty", "", "dull " * 40]


def test_a_provider_that_falls_back_silently_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_cuda(monkeypatch)
    with pytest.raises(CascadeError, match="asked for the provider CUDA.*, but CPUExecutionProvider runs"):
        CascadeRuntime(bundle, provider="cuda").predict(["a film"])


def _without_cuda(monkeypatch: pytest.MonkeyPatch, says: str = "CPUExecutionProvider") -> list[Any]:
    """Stand in for a machine where CUDA is installed and does not start; return what sessions were asked for."""
    session, asked = onnxruntime.InferenceSession, []

    class Session:
        def __init__(self, path: str, options: Any, providers: Any, **_: Any) -> None:
            asked.append(providers)
            self._session = session(path, options, ["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [says]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return []

        def run(self, *_: Any) -> None:
            raise AssertionError("on a device, inputs and outputs are bound")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", says])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return asked


def test_on_a_device_inputs_and_logits_are_bound(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for the device: the answers are the same, and its options reach the provider."""
    right = CascadeRuntime(bundle).predict(TEXTS)
    asked = _without_cuda(monkeypatch, "CUDAExecutionProvider")
    runtime = CascadeRuntime(bundle, provider="cuda", provider_options={"device_id": "1"})
    for answer, expected in zip(runtime.predict(TEXTS), right, strict=True):
        assert answer.exit == expected.exit
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert asked[0] == [("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested", "device_id": "1"})]


def test_int8_is_not_sent_to_a_device_that_cannot_run_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_cuda(monkeypatch)
    entry = MemberEntry("small", "small.onnx", "", 2, 32, 1, "int8", None)
    with pytest.raises(
        InputError,
        match="`provider`: found .CUDA.*one that can run the int8 products of member 'small'; .* in the precision fp16",
    ):
        Stage(entry, bundle / "small.onnx", 3, Execution("CUDAExecutionProvider", 1))


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
@pytest.mark.parametrize("provider", [CPU, CUDA, OPENVINO])
def test_a_precision_is_refused_with_one_that_the_provider_runs(precision: Precision, provider: str) -> None:
    """Products of bytes saturate on some CPUs, where exact kernels run them; CUDA has no kernels for them at all."""
    instead = instead_of(precision.name, provider)
    assert instead is None or instead_of(instead, provider) is None
    assert instead is None or provider != CPU
    sums_bytes = precision.products_of_bytes or precision.name == "int8-table"
    assert (instead is not None) == sums_bytes or provider != CUDA


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
def test_an_older_onnx_runtime_is_refused_with_the_version_that_runs_the_precision(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = precision.since
    monkeypatch.setattr("onnxruntime.__version__", f"{major}.{minor}.0")
    check_precision("small", precision.name, CPU)
    monkeypatch.setattr("onnxruntime.__version__", f"{major}.{minor - 1}.2")
    reason = rf"member 'small': found onnxruntime 1\.\d+\.2, .* {precision.name}; install onnxruntime 1\.{minor} or"
    with pytest.raises(BundleError, match=reason):
        check_precision("small", precision.name, CPU)


def test_the_probe_for_saturation_is_one_product_of_bytes() -> None:
    import onnx

    from cascade_rt.engine.providers import _PRODUCT, int8_saturates

    (node,) = onnx.load_from_string(_PRODUCT).graph.node
    assert (node.op_type, list(node.input)) == ("MatMulInteger", ["a", "b"])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "vnni" in flags:
        assert not int8_saturates()


def test_a_provider_that_runs_nothing_is_an_error(bundle: Path) -> None:
    """The wheel for CPUs lists a provider for a web service, which is there and runs no operator at all."""
    name = "AzureExecutionProvider"
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}")
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not report where operators run")
    with pytest.raises(CascadeError, match=f"asked for the provider {name}.* it runs no .*MatMul"):
        CascadeRuntime(bundle, provider=name).predict(["a film"])


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "openvino", "DnnlExecutionProvider"])
def test_a_cluster_reserves_no_gpu_for_what_runs_on_cpus(name: str) -> None:
    assert not needs_gpu(name)


@pytest.mark.parametrize("name", ["cuda", "CUDA", "CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_cluster_reserves_a_gpu_for_others(name: str) -> None:
    assert needs_gpu(name)


def test_a_provider_that_nobody_has_is_an_error() -> None:
    with pytest.raises(InvalidOption, match="`provider`: found 'gpu', expected cpu, cuda, openvino or"):
        needs_gpu("gpu")
