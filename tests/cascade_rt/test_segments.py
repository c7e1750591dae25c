"""Multi-exit models: segments hand hidden states on, and answer as the model in one piece does (numpy, float64)."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cascade_rt import BundleError, CascadeRuntime, InvalidOption, Prediction, Trace, read_bundle
from cascade_rt.benchmark import latency
from cascade_rt.bundle import sha256_of
from cascade_rt.cli import main
from cascade_rt.engine.cost import layer_speedup
from cascade_rt.engine.task import SingleLabel
from cascade_rt.tuning.evaluation import evaluate

from ..toy import LABELS, WORDS, Member, cascade_members, segment_members, write_bundle, write_segments
from .bundle.manifests import altered, set_to
from .reference import confidence_exit, patience_exit, stage_probabilities, tokenized

TASK = SingleLabel()

_DRAW = random.Random(0)
TEXTS = [" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(0, 45))) for _ in range(150)]  # several micro-batches


@pytest.fixture(scope="module")
def expected(four_segments: Path) -> NDArray[np.float64]:
    """Probabilities of the whole model after each layer, (4, texts, labels)."""
    members = segment_members(segments=4, layers_each=1)
    probabilities = stage_probabilities(members, tokenized(str(four_segments / "tokenizer.json"), TEXTS))
    two_best = np.sort(probabilities, axis=-1)[..., -2:]
    assert np.diff(two_best).min() > 1e-4, "no text is so close that rounding decides its class"
    return probabilities


def with_patience(folder: Path, patience: int) -> Path:
    return write_segments(folder, segments=4, layers_each=1, exit_rule={"kind": "patience", "patience": patience})


@pytest.mark.parametrize("layers_each", [1, 2])
def test_every_exit_answers_as_the_whole_model_does(two_segments: Path, four_segments: Path, layers_each: int) -> None:
    members = segment_members(segments=4 // layers_each, layers_each=layers_each)
    folder = four_segments if layers_each == 1 else two_segments
    logits, lengths = CascadeRuntime(folder).member_logits(TEXTS)
    encodings = tokenized(str(folder / "tokenizer.json"), TEXTS)
    assert lengths.tolist() == [len(encoding.ids) for encoding in encodings]
    np.testing.assert_allclose(TASK.probabilities(logits), stage_probabilities(members, encodings), atol=1e-5, rtol=0)


def test_segments_of_pairs_answer_as_the_whole_model_does(tmp_path: Path) -> None:
    pairs = list(zip(TEXTS[:40], TEXTS[40:80], strict=True))
    folder = write_segments(tmp_path / "pairs", pair=True)
    found = TASK.probabilities(CascadeRuntime(folder).member_logits(pairs)[0])
    expected = stage_probabilities(segment_members(), tokenized(str(folder / "tokenizer.json"), pairs))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_texts_leave_where_pabees_counter_says(expected: NDArray[np.float64], tmp_path: Path, patience: int) -> None:
    classes = expected.argmax(axis=-1)
    wanted = [patience_exit(classes[:, text].tolist(), patience) for text in range(len(TEXTS))]
    answers = CascadeRuntime(with_patience(tmp_path / "segments", patience)).predict(TEXTS)
    assert [answer.exit for answer in answers] == wanted
    for text, answer in enumerate(answers):
        assert answer.layers == answer.exit + 1
        assert answer.label == LABELS[classes[answer.exit, text]]
        np.testing.assert_allclose(answer.probabilities, expected[answer.exit, text], atol=1e-5, rtol=0)
    # Four segments: with patience 1 texts leave at three of them, with patience 2 at two, from 3 on only at the last.
    assert sorted(set(wanted)) == {1: [1, 2, 3], 2: [2, 3]}.get(patience, [3])


def test_later_segments_run_exactly_the_texts_that_have_not_left(four_segments: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(four_segments, trace=traces.append)
    exits = np.array([answer.exit for answer in runtime.predict(TEXTS)])
    (trace,) = traces
    rows = [sum(run.rows for run in trace.runs if run.stage == stage) for stage in range(4)]
    assert rows == [int(np.sum(exits >= stage)) for stage in range(4)]
    assert rows[3] < rows[2] < rows[1] == len(TEXTS)
    # Regrouped: the survivors are batched anew, not run in the batches that they came in.
    batches = [sum(run.stage == stage for run in trace.runs) for stage in range(4)]
    assert batches[3] < batches[0]
    lengths = [len(encoding.ids) for encoding in tokenized(str(four_segments / "tokenizer.json"), TEXTS)]
    longest = max(length for length, exit in zip(lengths, exits, strict=True) if exit == 3)
    assert max(run.tokens for run in trace.runs if run.stage == 3) == longest


class Recording:
    """Stands before a session and keeps the hidden states that reach it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.states: list[NDArray[np.float32]] = []

    def run(self, outputs: list[str], feeds: dict[str, NDArray[Any]]) -> Any:
        for states, mask in zip(feeds["hidden_states"], feeds["attention_mask"], strict=True):
            self.states.append(states[: mask.sum()])
        return self._session.run(outputs, feeds)


def test_states_of_texts_that_left_are_not_handed_on(four_segments: Path) -> None:
    runtime = CascadeRuntime(four_segments)
    before = [answer.exit for answer in runtime.predict(TEXTS)]
    stage = runtime.plan.stages[3]
    stage._sessions[False] = recording = Recording(stage.load())
    runtime.predict(TEXTS)
    lengths = [len(encoding.ids) for encoding in tokenized(str(four_segments / "tokenizer.json"), TEXTS)]
    staying = sorted(length for length, exit in zip(lengths, before, strict=True) if exit == 3)
    assert sorted(len(states) for states in recording.states) == staying


def test_a_text_alone_is_answered_as_in_a_batch(two_segments: Path, four_segments: Path) -> None:
    for folder in (two_segments, four_segments):
        runtime = CascadeRuntime(folder)
        for text, together in zip(TEXTS, runtime.predict(TEXTS), strict=True):
            (alone,) = runtime.predict([text])
            assert (alone.label, alone.exit, alone.layers) == (together.label, together.exit, together.layers)
            np.testing.assert_allclose(alone.probabilities, together.probabilities, atol=1e-5, rtol=0)


def test_the_order_of_the_texts_does_not_matter(four_segments: Path) -> None:
    runtime = CascadeRuntime(four_segments)
    order = random.Random(1).sample(range(len(TEXTS)), len(TEXTS))
    in_order = runtime.predict(TEXTS)
    for index, other in zip(order, runtime.predict([TEXTS[index] for index in order]), strict=True):
        assert (other.label, other.exit) == (in_order[index].label, in_order[index].exit)
        np.testing.assert_allclose(other.probabilities, in_order[index].probabilities, atol=1e-5, rtol=0)


def test_stats_count_the_layers_that_ran(four_segments: Path) -> None:
    runtime = CascadeRuntime(four_segments)
    exits = np.array([answer.exit for answer in runtime.predict(TEXTS)])
    stats = runtime.stats()
    assert stats.exits == np.bincount(exits, minlength=4).tolist()
    assert stats.mean_layers == pytest.approx((exits + 1).mean())
    assert stats.p_value is None


def test_speedups_compare_with_the_whole_chain(four_segments: Path, two_segments: Path) -> None:
    for folder, layers_each in ((four_segments, 1), (two_segments, 2)):
        runtime = CascadeRuntime(folder)
        assert list(runtime.original) == list(runtime.bundle.members)
        answers = runtime.predict(TEXTS)
        exits = np.array([answer.exit for answer in answers])
        ratio = layer_speedup(runtime.bundle.members, exits, runtime.original)
        assert ratio == pytest.approx(4 * len(TEXTS) / sum(answer.layers for answer in answers))
        assert ratio == pytest.approx(4 / ((exits + 1) * layers_each).mean())


def test_evaluate_measures_segments_and_their_exits(
    four_segments: Path, expected: NDArray[np.float64], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = [LABELS[index % 3] for index in range(len(TEXTS))]
    path = tmp_path / "labelled.jsonl"
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, truth, strict=True)]
    path.write_text("\n".join(rows))
    assert main(["evaluate", "--model-dir", str(four_segments), "--input", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    classes = expected.argmax(axis=-1)
    exits = np.array([patience_exit(column.tolist(), 1) for column in classes.T])
    right = np.array([LABELS.index(label) for label in truth]) == classes
    assert report["cascade"]["exits"] == np.bincount(exits, minlength=4).tolist()
    assert report["cascade"]["accuracy"] == pytest.approx(right[exits, np.arange(len(TEXTS))].mean())
    assert report["cascade"]["thresholds"] == []
    assert report["cascade"]["mean_layers"] == pytest.approx((exits + 1).mean())
    assert report["cascade"]["layer_speedup"] == pytest.approx(4 / (exits + 1).mean())
    assert [member["accuracy"] for member in report["members"]] == pytest.approx(right.mean(axis=1).tolist())
    assert main(["evaluate", "--model-dir", str(four_segments), "--input", str(path)]) == 0
    assert "segment-4" in capsys.readouterr().out


def test_a_prefix_of_the_chain_runs_and_its_speedup_is_over_the_whole_model(
    four_segments: Path, expected: NDArray[np.float64]
) -> None:
    whole = CascadeRuntime(four_segments)
    prefix = whole.with_members(["segment-2", "segment-1"])
    answers = prefix.predict(TEXTS)
    assert {answer.exit for answer in answers} == {1}, "two segments agree at the last at the earliest"
    np.testing.assert_allclose([answer.probabilities for answer in answers], expected[1], atol=1e-5, rtol=0)
    assert list(prefix.original) == list(whole.bundle.members)
    logits, lengths = prefix.member_logits(TEXTS)
    labels = np.zeros(len(TEXTS), dtype=np.intp)
    report = evaluate(prefix.bundle.members, prefix.exit_rule, logits, labels, lengths, prefix.original)
    assert report.cascade.layer_speedup == pytest.approx(2)
    assert report.cascade.flops_speedup == pytest.approx(2)


@pytest.mark.parametrize("names", [["segment-2"], ["segment-1", "segment-3"], ["segment-1", "segment-2", "segment-4"]])
def test_a_segment_without_its_predecessor_is_refused(four_segments: Path, names: list[str]) -> None:
    missing = f"segment-{int(names[-1][-1]) - 1}"
    says = rf"`members`: found .*, expected '{missing}' too, whose hidden states '{names[-1]}' reads"
    for opened in (
        lambda: CascadeRuntime(four_segments).with_members(names),
        lambda: CascadeRuntime(four_segments, members=names),
        lambda: read_bundle(four_segments, names),
    ):
        with pytest.raises(InvalidOption, match=says) as caught:
            opened()
        assert caught.value.field == "members"


def test_thresholds_are_refused_where_another_rule_decides(
    four_segments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = CascadeRuntime(four_segments)
    assert runtime.thresholds == []
    ways: list[Callable[[], object]] = [
        lambda: CascadeRuntime(four_segments, thresholds=0.5),
        lambda: CascadeRuntime(four_segments, thresholds=[0.5, 0.5, 0.5]),
        lambda: runtime.with_thresholds(0.5),
    ]
    for opened in ways:
        with pytest.raises(
            InvalidOption, match="`thresholds`: found .*, expected none: the exit rule patience has no thresholds"
        ):
            opened()
    assert runtime.with_thresholds(None).predict(TEXTS[:9]) == runtime.predict(TEXTS[:9])
    assert main(["predict", "--model-dir", str(four_segments), "--threshold", "0.5", "a film"]) == 2
    error = capsys.readouterr().err
    assert "--threshold: found 0.5, expected none: the exit rule patience has no thresholds" in error
    assert error.count("\n") == 1


def test_tuning_finds_the_patience(
    four_segments: Path, expected: NDArray[np.float64], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fastest of all numbers that is allowed, by counting text by text; the tuned bundle answers as promised."""
    classes = expected.argmax(axis=-1)
    by_patience = {}
    for patience in (1, 2, 3, 4):
        left = np.array([patience_exit(column.tolist(), patience) for column in classes.T])
        by_patience[patience] = (left + 1).mean(), float(np.mean(classes[left, range(len(TEXTS))] != classes[-1])), left
    drop = by_patience[2][1] + 1e-9
    best = min(patience for patience, (_, lost, _) in by_patience.items() if lost <= drop)
    folder = shutil.copytree(four_segments, tmp_path / "tuned")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ["--model-dir", str(folder), "--input", "texts.txt", "--agreement", "--max-drop", str(drop), "--json"]
    assert main(["tune", *arguments, "--no-cache"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    layers, lost, left = by_patience[best]
    assert (chosen["exit_rule"], chosen["thresholds"]) == ({"kind": "patience", "patience": best}, [])
    assert chosen["drop"] == pytest.approx(lost)
    assert chosen["layers_speedup"] == pytest.approx(4 / layers)
    runtime = CascadeRuntime(folder)
    assert [answer.exit for answer in runtime.predict(TEXTS)] == left.tolist()
    assert runtime.stats().exits == chosen["exits"]
    assert read_bundle(folder).exit_rule == {"kind": "patience", "patience": best}
    shown = [*arguments[:-1], "--no-cache", "--dry-run"]
    assert main(["tune", *shown]) == 0
    assert f"patience {best}" in capsys.readouterr().out


def test_patience_can_be_changed(four_segments: Path, expected: NDArray[np.float64], tmp_path: Path) -> None:
    runtime = CascadeRuntime(four_segments)
    classes = expected.argmax(axis=-1)
    for patience in (1, 2, 3):
        wanted = [patience_exit(column.tolist(), patience) for column in classes.T]
        assert [answer.exit for answer in runtime.with_patience(patience).predict(TEXTS)] == wanted
    assert {answer.exit for answer in runtime.without_exits().predict(TEXTS)} == {3}
    with pytest.raises(InvalidOption, match="`patience`: found 0, expected a whole number from 1"):
        runtime.with_patience(0)
    other = CascadeRuntime(by_confidence(tmp_path / "other", segment_members(), [0.9]))
    with pytest.raises(InvalidOption, match="expected none: the exit rule maximum_probability has no patience"):
        other.with_patience(2)


def test_a_benchmark_of_thresholds_is_refused_in_one_line(
    four_segments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--texts", "8", "--rounds", "1", "--batch-size", "4"]
    assert main(["benchmark", "--model-dir", str(four_segments), *arguments]) == 2
    error = capsys.readouterr().err
    assert "patience" in error, "the exit rule is why"
    assert error.count("\n") == 1


def test_info_shows_the_exit_rule(four_segments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model-dir", str(four_segments)]) == 0
    assert "exit rule   patience (patience 1)" in capsys.readouterr().out
    assert main(["info", "--model-dir", str(four_segments), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["format_version"], manifest["exit_rule"]) == (2, {"kind": "patience", "patience": 1})


def by_confidence(folder: Path, members: Sequence[Member], thresholds: Sequence[float]) -> Path:
    return write_bundle(folder, members, thresholds=thresholds, extra={"format_version": 2})


def exits_by_confidence(probabilities: NDArray[np.float64], thresholds: Sequence[float]) -> list[int]:
    return [confidence_exit(column.tolist(), thresholds) for column in probabilities.max(axis=-1).T]


def test_segments_can_exit_by_confidence(expected: NDArray[np.float64], tmp_path: Path) -> None:
    thresholds = [0.9, 0.8, 0.7]
    folder = by_confidence(tmp_path / "segments", segment_members(segments=4, layers_each=1), thresholds)
    runtime = CascadeRuntime(folder)
    assert runtime.thresholds == thresholds
    answers = runtime.predict(TEXTS)
    assert [answer.exit for answer in answers] == exits_by_confidence(expected, thresholds)
    assert len({answer.exit for answer in answers}) == 4
    assert runtime.bundle.to_json()["format_version"] == 2
    lowest = runtime.with_thresholds(0.0).predict(TEXTS)
    assert {(answer.exit, answer.layers) for answer in lowest} == {(0, 1)}


@pytest.mark.parametrize("kind", ["maximum_probability", "entropy"])
def test_segments_with_thresholds_are_tuned(
    kind: str,
    expected: NDArray[np.float64],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tuned bundle does as tuning promised; a segment that no text leaves runs with threshold 1."""
    extra = {"format_version": 2, "exit_rule": {"kind": kind}}
    members = segment_members(segments=4, layers_each=1)
    folder = write_bundle(tmp_path / "segments", members, thresholds=[0.9] * 3, extra=extra)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ["--model-dir", str(folder), "--input", "texts.txt", "--agreement", "--no-cache", "--json"]
    assert main(["tune", *arguments, "--max-drop", "0.1"]) == 0
    report = json.loads(capsys.readouterr().out)
    chosen = report["chosen"]
    assert chosen["drop"] <= 0.1 + 1e-9
    assert chosen["layers_speedup"] > 1
    assert [alone["members"] for alone in report["alone"]] == [
        [f"segment-{index}" for index in range(1, last + 1)] for last in range(1, 5)
    ]
    assert [alone["layers_speedup"] for alone in report["alone"]] == pytest.approx([4, 2, 4 / 3, 1])
    runtime = CascadeRuntime(folder)
    answers = runtime.predict(TEXTS)
    assert runtime.thresholds == chosen["thresholds"]
    assert runtime.stats().exits == chosen["exits"]
    assert 4 * len(TEXTS) / sum(answer.layers for answer in answers) == pytest.approx(chosen["layers_speedup"])
    classes = expected.argmax(axis=-1)
    agreeing = [LABELS[chosen] == answer.label for chosen, answer in zip(classes[-1], answers, strict=True)]
    assert np.mean(agreeing) == pytest.approx(chosen["accuracy"])
    monkeypatch.setattr(latency, "_cold_start", partial(latency._cold_start, runs=1))
    assert main(["benchmark", "--model-dir", str(folder), "--texts", "8", "--rounds", "1", "--batch-size", "4"]) == 0


def test_texts_leave_by_entropy_where_a_plain_loop_says(expected: NDArray[np.float64], tmp_path: Path) -> None:
    """DeeBERT: leave at the first exit whose entropy is below S; FastBERT: the same, as a share of the largest one."""
    s = 0.25
    extra = {"format_version": 2, "exit_rule": {"kind": "entropy"}}
    tau = 1 - s / math.log(len(LABELS))
    members = segment_members(segments=4, layers_each=1)
    runtime = CascadeRuntime(write_bundle(tmp_path / "segments", members, thresholds=[tau] * 3, extra=extra))
    wanted = [
        next((exit for exit in range(3) if -sum(p * math.log(p) for p in column[exit]) < s), 3)
        for column in expected.swapaxes(0, 1)
    ]
    assert len(set(wanted)) == 4
    assert [answer.exit for answer in runtime.predict(TEXTS)] == wanted
    assert [runtime.predict([text])[0].exit for text in TEXTS] == wanted


def test_a_member_before_a_chain_costs_its_layers_and_hands_nothing_on(tmp_path: Path) -> None:
    """A complete one-layer member, then a model of four layers in two segments: tokens are read again by the second."""
    members = [cascade_members()[0], *segment_members()]
    thresholds = [0.9, 0.9]
    folder = by_confidence(tmp_path / "mixed", members, thresholds)
    probabilities = stage_probabilities(members, tokenized(str(folder / "tokenizer.json"), TEXTS))
    runtime = CascadeRuntime(folder)
    np.testing.assert_allclose(TASK.probabilities(runtime.member_logits(TEXTS)[0]), probabilities, atol=1e-5, rtol=0)
    answers = runtime.predict(TEXTS)
    assert [answer.exit for answer in answers] == exits_by_confidence(probabilities, thresholds)
    assert {(answer.exit, answer.layers) for answer in answers} == {(0, 1), (1, 3), (2, 5)}
    assert [answer.exit for answer in (runtime.predict([text])[0] for text in TEXTS)] == [
        answer.exit for answer in answers
    ]
    assert [entry.name for entry in runtime.original] == ["segment-1", "segment-2"]
    exits = np.array([answer.exit for answer in answers])
    executed = sum(answer.layers for answer in answers)
    assert layer_speedup(runtime.bundle.members, exits, runtime.original) == pytest.approx(4 * len(TEXTS) / executed)


def test_one_patient_cascade_of_whole_members(tmp_path: Path) -> None:
    """Patience does not need segments: each member starts from the tokens, and all layers of all members count."""
    extra = {"format_version": 2, "exit_rule": {"kind": "patience", "patience": 1}}
    folder = write_bundle(tmp_path / "patient", cascade_members(), thresholds=[], extra=extra)
    probabilities = stage_probabilities(cascade_members(), tokenized(str(folder / "tokenizer.json"), TEXTS))
    answers = CascadeRuntime(folder).predict(TEXTS)
    classes = probabilities.argmax(axis=-1)
    assert [answer.exit for answer in answers] == [patience_exit(column.tolist(), 1) for column in classes.T]
    assert {(answer.exit, answer.layers) for answer in answers} == {(1, 3), (2, 7)}


def test_every_bundle_of_version_1_still_loads(bundle: Path, pair_bundle: Path, tmp_path: Path) -> None:
    alone = write_bundle(tmp_path / "alone", cascade_members()[:1], thresholds=[])
    for folder, texts in ((bundle, TEXTS[:5]), (pair_bundle, [("a film", "so sad")]), (alone, TEXTS[:5])):
        assert json.loads((folder / "cascade.json").read_text("utf-8"))["format_version"] == 1
        made = read_bundle(folder)
        assert made.format_version == 1
        assert {member.reads for member in made.members} == {"tokens"}
        answers: list[Prediction] = CascadeRuntime(folder).predict(texts)
        assert len(answers) == len(texts)


def test_an_empty_text_without_special_tokens_is_answered_alone_as_in_a_batch(tmp_path: Path) -> None:
    """Such a text has no tokens at all: it is padded to one, which the segments hand on as any other."""
    folder = write_segments(tmp_path / "bare", exit_rule={"kind": "patience", "patience": 1})
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"post_processor": None}), "utf-8")
    assert tokenized(str(file), [""])[0].ids == []
    altered(folder, set_to("tokenizer", "sha256", to=sha256_of(file)))
    runtime = CascadeRuntime(folder)
    (alone,) = runtime.predict([""])
    for others in ([""], ["a film"], ["a good film", "so sad"]):
        (together, *_) = runtime.predict(["", *others])
        assert (together.label, together.exit) == (alone.label, alone.exit)
        np.testing.assert_allclose(together.probabilities, alone.probabilities, atol=1e-5, rtol=0)


def test_a_chain_that_starts_with_hidden_states_is_refused(tmp_path: Path) -> None:
    members = [replace(member, from_hidden=True) for member in segment_members()]
    folder = by_confidence(tmp_path / "headless", members, [0.5])
    with pytest.raises(BundleError, match=r"members\[0\]: reads hidden states, but no member is before it"):
        read_bundle(folder)
