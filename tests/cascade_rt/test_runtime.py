"""The contract of CascadeRuntime: who runs on what, and answers that do not depend on company."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cascade_rt
from cascade_rt import BundleError, CascadeError, CascadeRuntime, InputError, Prediction
from cascade_rt.batching import by_length, micro_batches

from ..conftest import WORDS

TEXTS = ["a great film", "so sad", "the cat sat on the mat and that was not very witty", "", "dull " * 40]

texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> CascadeRuntime:
    return CascadeRuntime(bundle, thresholds=[0.6, 0.8])


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 40))) for _ in range(300)]


class CountingSession:
    """Stands before a member's session and counts the rows that reach it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.rows = 0

    def run(self, outputs: None, feeds: dict[str, np.ndarray]) -> Any:
        self.rows += len(feeds["input_ids"])
        return self._session.run(outputs, feeds)


def test_a_text_that_left_never_reaches_a_bigger_member(bundle: Path, corpus: list[str]) -> None:
    runtime = CascadeRuntime(bundle, thresholds=[0.6, 0.8])
    for member in runtime._members:
        member.session = CountingSession(member.load())
    predictions = runtime.predict(corpus)
    exits = [prediction.exit for prediction in predictions]
    assert len(set(exits)) == 3, "the case needs texts that leave at every member"
    seen = [member.session.rows for member in runtime._members]
    assert seen == [300, sum(exit > 0 for exit in exits), sum(exit > 1 for exit in exits)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_prediction_is_the_same_alone_in_any_batch_and_in_any_order(
    runtime: CascadeRuntime, data: st.DataObject
) -> None:
    some = data.draw(st.lists(texts, min_size=1, max_size=90))  # several micro-batches
    order = data.draw(st.permutations(range(len(some))))
    together = runtime.predict(some)
    shuffled = runtime.predict([some[index] for index in order])
    alone = [runtime.predict([text])[0] for text in some]
    for index, other in [*zip(order, shuffled, strict=True), *enumerate(alone)]:
        assert (other.label, other.exit, other.layers) == (
            together[index].label,
            together[index].exit,
            together[index].layers,
        )
        np.testing.assert_allclose(other.probabilities, together[index].probabilities, atol=1e-5)


def test_tau_zero_answers_at_member_1_and_tau_one_at_the_last(bundle: Path, corpus: list[str]) -> None:
    assert {row.exit for row in CascadeRuntime(bundle, thresholds=0.0).predict(corpus)} == {0}
    last = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert {(row.exit, row.layers) for row in last} == {(2, 1 + 2 + 4)}


def test_tau_one_equals_the_last_member_alone(
    bundle: Path, member_folders: list[Path], corpus: list[str], tmp_path: Path
) -> None:
    from cascade_export.export import export_bundle

    export_bundle([str(member_folders[-1])], tmp_path / "alone", max_length=32)
    alone = CascadeRuntime(tmp_path / "alone").predict(corpus)
    cascade = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert [row.label for row in cascade] == [row.label for row in alone]
    np.testing.assert_allclose([row.probabilities for row in cascade], [row.probabilities for row in alone], atol=1e-6)
    assert {row.layers for row in alone} == {4}


def test_predictions_agree_with_torch(bundle: Path, member_folders: list[Path], corpus: list[str]) -> None:
    """An independent reference: transformers, one text at a time, Algorithm 1 as a plain loop."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in member_folders]
    tokenizer = AutoTokenizer.from_pretrained(member_folders[0])
    for text, answer in zip(corpus[:60], CascadeRuntime(bundle, thresholds=0.7).predict(corpus[:60]), strict=True):
        batch = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        for exit, model in enumerate(models):
            with torch.inference_mode():
                probabilities = torch.softmax(model(**batch).logits[0].double(), -1)
            if probabilities.max() > 0.7 or exit == 2:
                break
        assert answer.exit == exit
        np.testing.assert_allclose(answer.probabilities, probabilities, atol=1e-5)
        assert answer.label == model.config.id2label[int(probabilities.argmax())]
        assert answer.score == max(answer.probabilities)


def test_predict_iter_streams_and_keeps_the_order(runtime: CascadeRuntime, corpus: list[str]) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in corpus:
            taken += 1
            yield text

    stream = runtime.predict_iter(source(), chunk_size=16)
    first = next(stream)
    assert taken == 16, "only the first chunk was read"
    rest = [first, *stream]
    for streamed, at_once in zip(rest, runtime.predict(corpus), strict=True):
        assert (streamed.label, streamed.exit) == (at_once.label, at_once.exit)


def test_predict_iter_refuses_one_text_and_names_the_place_of_a_bad_one(runtime: CascadeRuntime) -> None:
    with pytest.raises(InputError, match="expected a list"):
        runtime.predict_iter("lights")
    with pytest.raises(InputError, match="chunk size of 0"):
        runtime.predict_iter([], chunk_size=0)
    with pytest.raises(InputError, match="text 5: found a int"):
        list(runtime.predict_iter(["fine"] * 5 + [1], chunk_size=2))  # type: ignore[list-item]


def test_members_are_loaded_when_a_text_first_needs_them(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, thresholds=0.0)
    runtime.predict(["a film", "a cat"])
    assert [member.session is not None for member in runtime._members] == [True, False, False]
    runtime.thresholds = [1.0, 0.0]
    runtime.predict(["a film"])
    assert [member.session is not None for member in runtime._members] == [True, True, False]
    assert all(member.session is not None for member in CascadeRuntime(bundle, preload=True)._members)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_member_that_answers_nonsense_is_no_answer(bundle: Path, value: float) -> None:
    class Broken:
        def run(self, _: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            logits = np.zeros((len(feeds["input_ids"]), 3), dtype=np.float32)
            logits[-1, 1] = value
            return [logits]

    runtime = CascadeRuntime(bundle)
    runtime._members[0].load()
    runtime._members[0].session = Broken()
    for texts in (["a film"], ["a film", "a cat"]):
        with pytest.raises(BundleError, match="'tiny' answered NaN or infinity"):
            runtime.predict(texts)


def test_a_provider_that_falls_back_in_silence_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    _without_cuda(monkeypatch, onnxruntime)
    with pytest.raises(CascadeError, match="asked for the provider CUDA.*, but CPUExecutionProvider runs"):
        CascadeRuntime(bundle, provider="cuda").predict(["a film"])


def _without_cuda(monkeypatch: pytest.MonkeyPatch, onnxruntime: Any, says: str = "CPUExecutionProvider") -> list[Any]:
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
    import onnxruntime

    right = CascadeRuntime(bundle).predict(TEXTS)
    asked = _without_cuda(monkeypatch, onnxruntime, "CUDAExecutionProvider")
    runtime = CascadeRuntime(bundle, provider="cuda", provider_options={"device_id": "1"})
    for answer, expected in zip(runtime.predict(TEXTS), right, strict=True):
        assert answer.exit == expected.exit
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert asked[0] == [("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested", "device_id": "1"})]


def test_int8_is_not_sent_to_a_device_that_cannot_run_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from cascade_rt.bundle import MemberEntry
    from cascade_rt.member import Member

    _without_cuda(monkeypatch, onnxruntime)
    entry = MemberEntry("small", "small.onnx", "", 2, 32, 1, "int8", None)
    with pytest.raises(InputError, match="int8, whose products CUDA.* cannot run; .* --precision fp16"):
        Member(entry, bundle / "small.onnx", 3, "CUDAExecutionProvider", 1)


def test_int8_is_exact_where_the_cpu_would_saturate(
    member_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade_export.export import export_bundle

    from cascade_rt import member as module

    export_bundle([str(member_folders[1])], tmp_path / "int8", precision="int8", max_length=32)
    usual = CascadeRuntime(tmp_path / "int8").member_logits(TEXTS)[0]
    monkeypatch.setattr(module, "int8_saturates", lambda: True)
    runtime = CascadeRuntime(tmp_path / "int8", preload=True)
    options = runtime._members[0].session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    np.testing.assert_allclose(CascadeRuntime(tmp_path / "int8").member_logits(TEXTS)[0], usual, atol=1e-5)


def test_the_probe_for_saturation_is_the_model_that_it_says() -> None:
    import onnx

    from cascade_rt.member import _PRODUCT, int8_saturates

    (node,) = onnx.load_from_string(_PRODUCT).graph.node
    assert (node.op_type, list(node.input)) == ("MatMulInteger", ["a", "b"])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "vnni" in flags:
        assert not int8_saturates()


def test_a_provider_that_runs_nothing_is_an_error(bundle: Path) -> None:
    """The wheel for CPUs lists a provider for a web service, which is there and runs no operator at all."""
    import onnxruntime

    name = "AzureExecutionProvider"
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}")
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not tell where operators run")
    with pytest.raises(CascadeError, match=f"asked for the provider {name}.* it runs no .*MatMul"):
        CascadeRuntime(bundle, provider=name).predict(["a film"])


def test_called_it_answers_like_a_pipeline(runtime: CascadeRuntime, pair_bundle: Path) -> None:
    answer = runtime("a good film")
    assert answer == {"label": runtime.predict(["a good film"])[0].label, "score": answer["score"]}
    assert runtime({"text": "a good film"}) == answer
    assert [row["label"] for row in runtime(["a good film", "a bad film"])] == [
        row.label for row in runtime.predict(["a good film", "a bad film"])
    ]
    pairs = CascadeRuntime(pair_bundle)
    assert pairs(("a film", "a cat")) == pairs({"text": "a film", "text_pair": "a cat"})
    with pytest.raises(InputError, match="'txt'"):
        runtime({"txt": "a"})


def test_odd_texts_get_an_answer(runtime: CascadeRuntime) -> None:
    huge = "the film was good " * 60_000  # over 1 MB
    odd = ["", "   ", "\t\r\n", "🙂🙃", "a\0b", "\u200b", "x" * 5000, huge]
    answers = runtime.predict(odd)
    assert [row.truncated for row in answers] == [False] * 7 + [True]
    for text, answer in zip(odd, answers, strict=True):
        assert answer.label in runtime.bundle.labels
        assert sum(answer.probabilities) == pytest.approx(1)
        assert runtime.predict([text])[0].label == answer.label


def test_truncated_says_exactly_when_tokens_were_cut(runtime: CascadeRuntime, pair_bundle: Path) -> None:
    words = ["good"] * 30  # with [CLS] and [SEP] exactly the 32 tokens of the bundle
    fits, cut = runtime.predict([" ".join(words), " ".join([*words, "film"])])
    assert (fits.truncated, cut.truncated) == (False, True)
    np.testing.assert_allclose(fits.probabilities, cut.probabilities, atol=1e-5)
    half = " ".join(["good"] * 14)
    fits, cut = CascadeRuntime(pair_bundle).predict([(half, half + " a"), (half + " a", half + " a")])
    assert (fits.truncated, cut.truncated) == (False, True)


def test_no_texts_give_no_predictions(runtime: CascadeRuntime) -> None:
    assert runtime.predict([]) == []
    assert runtime([]) == []
    logits, lengths = runtime.member_logits([])
    assert logits.shape == (3, 0, 3)
    assert lengths.shape == (0,)


def test_member_logits_opens_every_gate(runtime: CascadeRuntime, bundle: Path, corpus: list[str]) -> None:
    logits, lengths = runtime.member_logits(corpus)
    assert logits.shape == (3, 300, 3)
    assert lengths.max() == 32
    answers = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert logits[-1].argmax(axis=1).tolist() == [runtime.bundle.labels.index(row.label) for row in answers]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["fine", ("a", "pair")], "text 1: found a tuple of 2, expected a text"),
        (["fine", None], "text 1: found a NoneType"),
        (["fine", b"bytes"], "text 1: found a bytes"),
        (["fine", "half \ud83d a pair"], "text 1: found half a surrogate pair at character 5"),
        ("one text", r"found one str, expected a list.*\[text\]"),
    ],
)
def test_what_is_no_text_is_refused(runtime: CascadeRuntime, wrong: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        runtime.predict(wrong)


@pytest.mark.parametrize("wrong", [["single"], [("a", "b", "c")], [("a", None)], [("a", "\udc00")]])
def test_what_is_no_pair_is_refused(pair_bundle: Path, wrong: Any) -> None:
    with pytest.raises(InputError, match="text 0: found"):
        CascadeRuntime(pair_bundle).predict(wrong)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"threads": 0}, "0 threads, expected 1 to 1024"),
        ({"threads": 10**11}, "expected 1 to 1024"),
        ({"provider": "tpu"}, "'tpu' is not available; found .*CPUExecutionProvider"),
        ({"provider": "cuda"}, "onnxruntime-gpu"),
        ({"thresholds": 1.5}, "from 0 to 1"),
        ({"thresholds": [0.5]}, "found 1 thresholds, expected 2"),
    ],
)
def test_wrong_arguments_are_refused(bundle: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        CascadeRuntime(bundle, **arguments)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=50).map(lambda lengths: np.array(lengths, dtype=np.intp)),
    st.integers(1, 200),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = list(micro_batches(by_length(lengths), lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)


def test_importing_and_predicting_loads_nothing_of_the_offline_stage(bundle: Path) -> None:
    code = (
        "import sys\n"
        "from cascade_rt import CascadeRuntime\n"
        f"CascadeRuntime({str(bundle)!r}).predict(['a good film'])\n"
        "from cascade_rt.cli import main\n"
        f"main(['predict', '--model-dir', {str(bundle)!r}, 'a film'])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'optimum', 'sklearn', 'scipy', 'cascade_export', 'cascade_train'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_public_names_are_the_documented_ones() -> None:
    assert set(cascade_rt.__all__) == {
        "Bundle",
        "BundleError",
        "CascadeError",
        "CascadeRuntime",
        "InputError",
        "MemberEntry",
        "MissingExtraError",
        "Prediction",
        "Stats",
        "__version__",
        "read_bundle",
    }
    assert all(hasattr(cascade_rt, name) for name in cascade_rt.__all__)
    assert Prediction._fields == ("label", "score", "probabilities", "exit", "layers", "truncated")
