"""A bundle as one ONNX file: the runtime's answers, from ONNX Runtime alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cascade_export.single_file import METADATA, pack
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt import BundleError, CascadeRuntime
from cascade_rt.bundle import read_bundle
from cascade_rt.bundle.files import sha256_of
from cascade_rt.cli import main
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InputError

from ..cascade_rt.bundle.manifests import altered, set_to
from ..toy import WORDS, write_cascade, write_segments
from .int8_bundles import to_int8

_DRAW = random.Random(0)
TEXTS = [" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(1, 45))) for _ in range(120)]
taus = st.sampled_from([0.0, 0.5, 0.7, 0.9, 1.0])


class Packed:
    """The single file in a session with ONNX Runtime's defaults, and the bundle's tokenizer."""

    def __init__(self, bundle: Path, file: Path, *, overwrite: bool = False) -> None:
        self.bundle = pack(bundle, file, overwrite=overwrite)
        self.session = onnxruntime.InferenceSession(str(file))
        self._tokenizer = TextTokenizer(bundle / self.bundle.tokenizer_file, self.bundle.max_length, self.bundle.pair)

    def __call__(self, texts: list[Any], thresholds: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        feed: dict[str, np.ndarray] = dict(self._tokenizer.encode(texts).batch(np.arange(len(texts))))
        probabilities, exits, layers = self.session.run(None, feed | {"thresholds": np.array(thresholds)})
        assert [probabilities.dtype, exits.dtype, layers.dtype] == [np.float32, np.int64, np.int64]
        return probabilities, exits, layers


@pytest.fixture(scope="module")
def packed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(bundle, tmp_path_factory.mktemp("packed") / "cascade.onnx")


def test_several_labels_are_answered_as_by_the_runtime(tmp_path: Path) -> None:
    extra = {"format_version": 3, "task": "multi_label", "cuts": [0.5, 0.3, 0.7]}
    folder = write_cascade(tmp_path / "bundle", extra=extra)
    pack(folder, tmp_path / "cascade.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "cascade.onnx"))
    runtime, thresholds = CascadeRuntime(folder), [0.6, 0.7]
    inputs = runtime.plan.tokenizer.encode(TEXTS).batch(np.arange(len(TEXTS)))
    found, exits, _, labels = session.run(None, inputs | {"thresholds": np.array(thresholds)})
    expected = runtime.with_thresholds(thresholds).predict(TEXTS)
    assert {len(answer.labels) for answer in expected} >= {0, 1, 2}
    assert exits.tolist() == [answer.exit for answer in expected]
    np.testing.assert_allclose(found, [answer.probabilities for answer in expected], atol=1e-5)
    assert labels.tolist() == [[name in answer.labels for name in runtime.bundle.labels] for answer in expected]
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "cascade.onnx").metadata_props}
    assert json.loads(facts[METADATA])["task"] == "multi_label"


@given(st.sampled_from(TEXTS), st.tuples(taus, taus))
def test_one_text_is_answered_as_by_the_runtime_to_the_last_bit(
    packed: Packed, bundle: Path, text: str, thresholds: tuple[float, float]
) -> None:
    probabilities, exits, layers = packed([text], list(thresholds))
    (expected,) = _runtime(bundle).with_thresholds(list(thresholds)).predict([text])
    assert (exits[0], layers[0]) == (expected.exit, expected.layers)
    np.testing.assert_array_equal(probabilities[0], np.array(expected.probabilities, dtype=np.float32))


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=20), st.tuples(taus, taus))
def test_a_batch_is_answered_as_by_the_runtime(
    packed: Packed, bundle: Path, texts: list[str], thresholds: tuple[float, float]
) -> None:
    probabilities, exits, layers = packed(texts, list(thresholds))
    expected = _runtime(bundle).with_thresholds(list(thresholds)).predict(texts)
    assert exits.tolist() == [answer.exit for answer in expected]
    assert layers.tolist() == [answer.layers for answer in expected]
    np.testing.assert_allclose(probabilities, [answer.probabilities for answer in expected], atol=1e-5)


_RUNTIMES: dict[Path, CascadeRuntime] = {}


def _runtime(bundle: Path) -> CascadeRuntime:
    return _RUNTIMES.setdefault(bundle, CascadeRuntime(bundle, threads=1))


def test_pairs_keep_their_token_types(pair_bundle: Path, tmp_path: Path) -> None:
    packed = Packed(pair_bundle, tmp_path / "pairs.onnx")
    pairs = list(zip(TEXTS[:30], TEXTS[30:60], strict=True))
    probabilities, exits, _ = packed(pairs, [0.8])
    expected = CascadeRuntime(pair_bundle, threads=1, thresholds=[0.8]).predict(pairs)
    assert set(exits.tolist()) == {0, 1}
    assert exits.tolist() == [answer.exit for answer in expected]
    np.testing.assert_allclose(probabilities, [answer.probabilities for answer in expected], atol=1e-5)


def test_int8_members_have_the_same_exits(copied: Path, tmp_path: Path) -> None:
    to_int8(copied)
    packed = Packed(copied, tmp_path / "int8.onnx")
    assert {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node} >= {"QuantizeLinear", "If"}
    expected = CascadeRuntime(copied, threads=1, thresholds=0.8).predict(TEXTS)
    probabilities, exits, _ = packed(TEXTS, [0.8, 0.8])
    assert set(exits.tolist()) == {0, 1, 2}
    assert exits.tolist() == [answer.exit for answer in expected]
    np.testing.assert_array_equal(
        probabilities, np.array([answer.probabilities for answer in expected], dtype=np.float32)
    )


def test_int8_is_refused_where_a_file_would_saturate(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_int8(copied, "int8-vnni")
    monkeypatch.setattr("cascade_rt.engine.providers.int8_saturates", lambda: True)
    with pytest.raises(
        BundleError, match=r"found member 'tiny' in int8-vnni on a CPU without VNNI.*; export the members again in int8"
    ):
        pack(copied, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_member_that_answers_nan_passes_the_text_on(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_export.single_file._check", lambda *_: None)  # the runtime refuses such a member
    model = onnx.load(copied / "tiny.onnx")
    (bias,) = (weight for weight in model.graph.initializer if weight.name.endswith("classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([np.nan, 0, 0], dtype=np.float32), bias.name))
    onnx.save(model, copied / "tiny.onnx")
    altered(copied, set_to("members", 0, "sha256", to=sha256_of(copied / "tiny.onnx")))
    _, exits, _ = Packed(copied, tmp_path / "nan.onnx")(TEXTS[:5], [0.0, 0.0])
    assert exits.tolist() == [1] * 5


def test_every_weight_is_outside_of_the_branches(packed: Packed, tmp_path: Path, bundle: Path) -> None:
    pack(bundle, tmp_path / "one.onnx")
    model = onnx.load(tmp_path / "one.onnx")
    branches = [setting.g for node in model.graph.node if node.op_type == "If" for setting in node.attribute]
    assert len(branches) == 4
    assert not any(branch.initializer for branch in branches)
    nodes = [node for branch in branches for node in branch.node]
    assert not any(node.op_type == "If" for node in nodes)
    constants = [node.attribute[0].t for node in nodes if node.op_type == "Constant"]
    assert constants
    assert all(math.prod(constant.dims) <= 1024 for constant in constants)
    onnx.checker.check_model(model)


def test_the_metadata_say_how_to_use_it(bundle: Path, tmp_path: Path) -> None:
    assert main(["pack", "--model-dir", str(bundle), "--output", str(tmp_path / "one.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"))
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    opened = read_bundle(bundle)
    assert facts == {
        "labels": list(opened.labels),
        "members": [{"name": entry.name, "layers": entry.layers} for entry in opened.members],
        "thresholds": opened.thresholds,
        "max_length": opened.max_length,
        "pair": False,
        "tokenizer_sha256": opened.tokenizer_sha256,
    }


def test_tuned_members_are_taken(copied: Path, tmp_path: Path) -> None:
    runtime = CascadeRuntime(copied, members=["small", "big"])
    (_, tau) = read_bundle(copied).thresholds
    altered(copied, set_to("tuning", to={"members": ["small", "big"], "thresholds": [tau], "exits": [60, 40]}))
    packed = Packed(copied, tmp_path / "one.onnx")
    assert [entry.name for entry in packed.bundle.members] == ["small", "big"]
    expected = runtime.with_thresholds(tau).predict(TEXTS)
    assert packed(TEXTS, [tau])[1].tolist() == [answer.exit for answer in expected]


def test_what_it_cannot_hold_is_refused_and_nothing_is_lost(bundle: Path, tmp_path: Path) -> None:
    segments = write_segments(tmp_path / "segments")
    with pytest.raises(BundleError, match="found members that are segments, or exits by patience; expected complete"):
        pack(segments, tmp_path / "one.onnx")
    (tmp_path / "one.onnx").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"one\.onnx: exists already; name another file, or overwrite it"):
        pack(bundle, tmp_path / "one.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == b"mine"
    with pytest.raises(InputError, match="does not exist; create it first"):
        pack(bundle, tmp_path / "nowhere" / "one.onnx")
    assert Packed(bundle, tmp_path / "one.onnx", overwrite=True)(TEXTS[:1], [0.0, 0.0])[1].tolist() == [0]
    assert [path.name for path in tmp_path.glob("*one*")] == ["one.onnx"]


def test_members_of_other_writers(tmp_path: Path) -> None:
    folder = write_cascade(tmp_path / "old")  # of an older operator set
    for name, change in (("tiny", _domain_by_its_other_name), ("small", _mask_through_a_branch)):
        model = onnx.load(folder / f"{name}.onnx")
        change(model)
        onnx.save(model, folder / f"{name}.onnx")
        at = {"tiny": 0, "small": 1}[name]
        altered(folder, set_to("members", at, "sha256", to=sha256_of(folder / f"{name}.onnx")))
    probabilities, exits, _ = Packed(folder, tmp_path / "one.onnx")(TEXTS, [0.8, 0.8])
    expected = CascadeRuntime(folder, threads=1).predict(TEXTS)
    assert set(exits.tolist()) == {0, 1, 2}
    assert exits.tolist() == [answer.exit for answer in expected]
    np.testing.assert_allclose(probabilities, [answer.probabilities for answer in expected], atol=1e-5)


def _domain_by_its_other_name(model: onnx.ModelProto) -> None:
    for library in [*model.opset_import, *model.graph.node]:
        library.domain = "ai.onnx"


def _mask_through_a_branch(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    kept = onnx.helper.make_node("Identity", ["attention_mask"], ["kept"])
    output = onnx.helper.make_tensor_value_info("kept", onnx.TensorProto.INT64, ["rows", "tokens"])
    branch = onnx.helper.make_graph([kept], "branch", [], [output])
    condition = onnx.helper.make_node("Constant", [], ["yes"], value=onnx.numpy_helper.from_array(np.array(True)))
    choice = onnx.helper.make_node("If", ["yes"], ["mask"], then_branch=branch, else_branch=branch)
    nodes = [condition, choice, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def test_rows_without_a_token_do_not_stop_a_call(packed: Packed) -> None:
    tokens = np.ones((2, 4), dtype=np.int64)
    feed = {"input_ids": tokens, "attention_mask": 0 * tokens, "token_type_ids": 0 * tokens}
    probabilities, exits, _ = packed.session.run(None, feed | {"thresholds": np.ones(2)})
    assert exits.tolist() == [2, 2]
    assert np.isfinite(probabilities).all()


def test_a_file_that_answers_otherwise_than_the_runtime_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_export.single_file._passing", _zeros)
    with pytest.raises(BundleError, match=r"do not work in one ONNX file \(.*\); export them from their checkpoints"):
        pack(bundle, tmp_path / "one.onnx")
    assert not list(tmp_path.iterdir())


def _zeros(at: int) -> onnx.GraphProto:
    """Return a branch that forgets the probabilities of texts that have left."""
    output = onnx.helper.make_tensor_value_info(f"zeros{at}", onnx.TensorProto.DOUBLE, ["rows", "labels"])
    node = onnx.helper.make_node("Sub", [f"found{at - 1}", f"found{at - 1}"], [f"zeros{at}"])
    return onnx.helper.make_graph([node], f"zeros{at}", [], [output])


def test_a_bundle_that_is_too_large(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_export.single_file._LARGEST", 1000)
    with pytest.raises(InputError, match=r"its members take \d+\.\d GB, expected at most 2\.1; use int8"):
        pack(bundle, tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx").exists()
