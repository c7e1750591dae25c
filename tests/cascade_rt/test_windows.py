"""Long texts in windows: against the windows of the tokenizers library, members run alone on them, and numpy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, softmax
from tokenizers import Encoding, Tokenizer

from cascade_rt import CascadeRuntime, InputError, InvalidOption, Prediction, TextError, Trace, read_bundle
from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.serving.batcher import Batcher, Overloaded
from cascade_rt.serving.client import Client, ServerError
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings
from cascade_rt.types import Text

from ..toy import WORDS, Member, cascade_members, encoder_weights, write_bundle
from .cli.commands import run
from .serving.conftest import listening

LENGTH, STRIDE = 16, 5
ROOM = LENGTH - 2
Array = NDArray[np.float64]
words = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)
pairs = st.tuples(words, words)
LONG = [" ".join(WORDS[(at * 7 + start) % len(WORDS)] for at in range(20 + start % 50)) for start in range(12)]
TEXTS = ["", "a film", *LONG, "the cat"]


def library(folder: Path, side: str = "right", strategy: str = "longest_first", stride: int = STRIDE) -> Tokenizer:
    """The bundle's tokenizer, which makes windows itself."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH, stride=stride, strategy=strategy, direction=side)
    return tokenizer


def windows(tokenizer: Tokenizer, text: str) -> list[Encoding]:
    whole = tokenizer.encode(text)
    return [whole, *whole.overflowing]


def rows(encoded: Encoded) -> list[list[list[int]]]:
    """The token ids of each row of each text."""
    counts = [1] * len(encoded) if encoded.counts is None else encoded.counts.tolist()
    ends = np.cumsum(counts).tolist()
    every = [encoded.batch(np.array([row]))["input_ids"][0].tolist() for row in range(sum(counts))]
    return [every[end - count : end] for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stride", [0, 1, STRIDE, ROOM - 1])
def test_windows_are_those_of_the_library(bundle: Path, tmp_path: Path, side: str, stride: int) -> None:
    reference = library(bundle, side, stride=stride)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path / "tokenizer.json", LENGTH, pair=False)

    @settings(max_examples=40)
    @given(st.lists(words, min_size=1, max_size=4))
    def compare(texts: list[str]) -> None:
        encoded = ours.encode(texts, stride)
        wanted = [[window.ids for window in windows(reference, text)] for text in texts]
        assert rows(encoded) == wanted
        assert not any(encoded.truncated(at) for at in range(len(texts)))
        assert encoded.tokens.tolist() == [sum(map(len, own)) for own in wanted]
        cut = ours.encode(texts)
        assert [own[0] for own in wanted] == [own[0] for own in rows(cut)], (
            "the first one is what remains of a cut text"
        )
        order = list(reversed(range(len(texts))))
        elsewhere = Encoded.gathered([(pickle.loads(pickle.dumps(encoded)), at) for at in order])
        assert rows(elsewhere) == wanted[::-1]

    compare()


def pair_windows(one: Sequence[int], two: Sequence[int], left: bool) -> tuple[list[list[int]], bool]:
    """The windows of a pair's tokens as a plain loop, and whether the shorter text is cut."""
    room = LENGTH - 3
    moving, other = (one, two) if len(one) > len(two) else (two, one)
    if len(one) + len(two) <= room:
        return [[2, *one, 3, *two, 3]], False
    kept = other if len(other) <= room // 2 else (other[-(room // 2) :] if left else other[: room // 2])
    size = room - len(kept)
    found, start = [], 0
    while True:
        end = len(moving) - start
        part = moving[max(0, end - size) : end] if left else moving[start : start + size]
        found.append([2, *part, 3, *kept, 3] if moving is one else [2, *kept, 3, *part, 3])
        if start + size >= len(moving):
            return found, len(kept) < len(other)
        start += size - STRIDE


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_of_a_pair_move_over_its_longer_text(pair_bundle: Path, tmp_path: Path, side: str) -> None:
    plain = library(pair_bundle, side)
    plain.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path / "tokenizer.json", LENGTH, pair=True)
    plain.no_truncation()
    second = library(pair_bundle, side, "only_second")

    @settings(max_examples=60)
    @given(pairs)
    def compare(pair: tuple[str, str]) -> None:
        encoded = ours.encode([pair], STRIDE)
        one, two = (plain.encode(text, add_special_tokens=False).ids for text in pair)
        wanted, cut = pair_windows(one, two, side == "left")
        assert rows(encoded) == [wanted]
        assert encoded.truncated(0) == cut
        if len(one) <= (LENGTH - 3) // 2 and len(two) >= len(one):
            whole = second.encode(*pair)
            assert [window.ids for window in [whole, *whole.overflowing]] == wanted

    compare()


@pytest.mark.parametrize(("pair", "most"), [(False, ROOM - 1), (True, 6)])
def test_a_stride_as_long_as_a_window_is_refused(
    bundle: Path, pair_bundle: Path, tmp_path: Path, pair: bool, most: int
) -> None:
    folder = write_bundle(tmp_path / "b", cascade_members(pair=pair)[:1], thresholds=[], pair=pair, max_length=LENGTH)
    assert CascadeRuntime(folder, stride=most).plan.windows is not None
    for value, expected in (
        (most + 1, f"from 0 to {most}, as this"),
        (-1, "from 0"),
        (True, "from 0"),
        (2.5, "from 0"),
    ):
        with pytest.raises(InvalidOption, match=expected) as caught:
            CascadeRuntime(folder, stride=value)  # type: ignore[arg-type]
        assert caught.value.field == "stride"
    with pytest.raises(InvalidOption, match="expected mean or max"):
        CascadeRuntime(folder, stride=1, aggregate="median")
    with pytest.raises(InvalidOption, match="a stride with it"):
        CascadeRuntime(folder, aggregate="max")
    narrow = write_bundle(tmp_path / "n", cascade_members()[:1], thresholds=[], pair=pair, max_length=3)
    if pair:
        with pytest.raises(InvalidOption, match="expected none, as this bundle takes 3 tokens"):
            CascadeRuntime(narrow, stride=0)
    with pytest.raises(InputError, match="the plan alone"):
        CascadeRuntime(CascadeRuntime(folder).plan, stride=1)


def test_a_huge_text_is_read_whole_or_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_rt.engine.tokenization._LONGEST", 150)
    monkeypatch.setattr("cascade_rt.engine.tokenization._WHOLE", 200)
    ours = TextTokenizer(bundle / "tokenizer.json", LENGTH, pair=False)
    text = "film " * 40
    assert rows(ours.encode(["a", text], STRIDE))[1] == [window.ids for window in windows(library(bundle), text)]
    with pytest.raises(TextError, match=r"text 1: found over 200 characters, and windows are made of all of it"):
        ours.encode(["a", text + "film"], STRIDE)
    assert ours.encode(["a", text + "film"]).truncated(1)


def with_bag(folder: Path) -> Path:
    """A bag of words, which has no layers, before the members of the cascade."""
    bag = Member("bag", encoder_weights(layers=1, hidden=16, seed=4), layers=range(0))
    extra = {"format_version": 3}
    members = [bag, *cascade_members()]
    write_bundle(folder, members, thresholds=[0.6, 0.7, 0.7], max_length=LENGTH, extra=extra)
    manifest = json.loads((folder / "cascade.json").read_text())
    manifest["members"][0]["flops"] = [200, 64]
    (folder / "cascade.json").write_text(json.dumps(manifest))
    return folder


def with_labels(folder: Path) -> Path:
    """Several labels per text."""
    extra = {"format_version": 3, "task": "multi_label"}
    return write_bundle(folder, cascade_members(), thresholds=[0.6, 0.7], max_length=LENGTH, extra=extra)


def in_segments(folder: Path) -> Path:
    """One model in four parts, each of which reads the hidden states of the one before."""
    from ..toy import segment_members

    extra = {"format_version": 2, "exit_rule": {"kind": "patience", "patience": 1}}
    members = segment_members(segments=4, layers_each=1)
    return write_bundle(folder, members, thresholds=(), max_length=LENGTH, extra=extra)


KINDS = {"bag": with_bag, "several labels": with_labels, "segments": in_segments}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("windows") / "bundle")


def alone(folder: Path) -> Callable[[Encoding], Array]:
    """Return what runs every member on one window: logits, (members, labels), by ONNX Runtime alone."""
    sessions = [
        onnxruntime.InferenceSession(folder / entry.file, providers=["CPUExecutionProvider"])
        for entry in read_bundle(folder).members
    ]

    def answers(window: Encoding) -> Array:
        feed = {"input_ids": window.ids, "token_type_ids": window.type_ids, "attention_mask": window.attention_mask}
        inputs: dict[str, Any] = {name: np.array([values], dtype=np.int64) for name, values in feed.items()}
        found = []
        for session in sessions:
            names = [output.name for output in session.get_outputs()]
            used = {one.name: inputs[one.name] for one in session.get_inputs()}
            outputs = dict(zip(names, session.run(None, used), strict=True))
            inputs["hidden_states"] = outputs.get("last_hidden_state")
            found.append(outputs["logits"][0].astype(np.float64))
        return np.array(found)

    return answers


def together(logits: Array, aggregate: str, several: bool) -> Array:
    """Probabilities, (members, labels), from the logits of the windows, (windows, members, labels)."""
    each: Array = expit(logits) if several else softmax(logits, axis=-1)
    joined: Array = each.mean(axis=0) if aggregate == "mean" else each.max(axis=0)
    return joined if several else joined / joined.sum(axis=-1, keepdims=True)


def exit_of(runtime: CascadeRuntime, probabilities: Array) -> int:
    """Return the exit of a text, by the rules of the toys as plain loops."""
    if not runtime.thresholds:  # patience 1: two in a row agree
        answers = probabilities.argmax(axis=-1)
        return next((at for at in range(1, len(answers) - 1) if answers[at] == answers[at - 1]), len(answers) - 1)
    confidence = probabilities.max(axis=-1)
    if runtime.task.several:
        confidence = np.maximum(probabilities, 1 - probabilities).min(axis=-1)
    close = np.abs(confidence[:-1] - runtime.thresholds) < 1e-4
    assume(not close.any())
    leaves = np.append(confidence[:-1] > runtime.thresholds, True)
    return int(leaves.argmax())


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_answers_are_those_of_a_plain_loop_over_windows(folder: Path, aggregate: str) -> None:
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE, aggregate=aggregate)
    reference, member_answers = library(folder), alone(folder)
    layers = np.cumsum([entry.layers for entry in runtime.bundle.members])
    order = st.permutations(TEXTS) | st.lists(words, min_size=1, max_size=6)

    @settings(max_examples=25)
    @given(order)
    def compare(texts: list[str]) -> None:
        answers = runtime.predict(texts)
        logits, lengths = runtime.member_logits(texts)
        finished = runtime.task.probabilities(logits)
        for at, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            own = windows(reference, text)
            wanted = together(np.array([member_answers(window) for window in own]), aggregate, runtime.task.several)
            np.testing.assert_allclose(finished[:, at], wanted, atol=1e-5, rtol=0)
            assert lengths[at] == sum(len(window.ids) for window in own)
            assert answer.exit == exit_of(runtime, wanted)
            assert answer.probabilities == pytest.approx(wanted[answer.exit], abs=1e-5)
            assert answer.layers == len(own) * layers[answer.exit]
            assert not answer.truncated
            (single,) = runtime.predict([text])
            assert single._replace(score=0, probabilities=()) == answer._replace(score=0, probabilities=())
            assert single.probabilities == pytest.approx(answer.probabilities, abs=1e-5)

    compare()


def test_a_text_that_fits_has_the_same_bits_as_without_a_stride(folder: Path) -> None:
    cutting = CascadeRuntime(folder, threads=1)
    runtime = cutting.with_stride(STRIDE, "max")
    for text in ("", "a film", " ".join(WORDS[:ROOM])):
        assert runtime.predict([text]) == cutting.predict([text])
        assert runtime.predict([text, LONG[1]])[0].exit == cutting.predict([text])[0].exit
    assert cutting.predict([LONG[0]])[0].truncated
    assert runtime.with_stride(None).predict(LONG) == cutting.predict(LONG)


def test_every_window_counts(folder: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE, trace=traces.append)
    answers = runtime.predict(TEXTS)
    counts = [len(windows(library(folder), text)) for text in TEXTS]
    (trace,) = traces
    for stage in range(len(runtime.bundle.members)):
        ran = sum(count for count, answer in zip(counts, answers, strict=True) if answer.exit >= stage)
        assert sum(run.rows for run in trace.runs if run.stage == stage) == ran
    assert runtime.stats().mean_layers == pytest.approx(np.mean([answer.layers for answer in answers]))
    assert [answer.exit for answer in answers] == [runtime.predict([text])[0].exit for text in TEXTS]
    (answer,) = runtime.predict([LONG[5]])
    assert sum(run.rows for run in traces[-1].runs) == (answer.exit + 1) * len(windows(library(folder), LONG[5]))
    assert traces[-1].texts == 1


def test_evaluate_counts_every_window(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = with_bag(tmp_path / "bundle")
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE)
    answers, members = runtime.predict(TEXTS), runtime.bundle.members
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": "good"}) + "\n" for text in TEXTS))
    options = ("--model-dir", folder, "--input", file, "--stride", STRIDE, "--json")
    _, (report,), _ = run(capsys, "evaluate", *options)
    found, each = report["cascade"], [windows(library(folder), text) for text in TEXTS]
    assert found["mean_layers"] == pytest.approx(np.mean([answer.layers for answer in answers]))
    assert found["accuracy"] == pytest.approx(np.mean([answer.label == "good" for answer in answers]))
    whole = sum(len(own) * members[-1].layers for own in each)
    assert found["layer_speedup"] == pytest.approx(whole / sum(answer.layers for answer in answers))
    costs = [[sum(float(member.cost(len(window.ids))) for window in own) for own in each] for member in members]
    executed = sum(sum(costs[at][row] for at in range(answer.exit + 1)) for row, answer in enumerate(answers))
    assert found["flops_speedup"] == pytest.approx(sum(costs[-1]) / executed)


def test_variants_and_pickles_keep_it(folder: Path) -> None:
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE, aggregate="max")
    expected = runtime.predict(LONG)
    assert "stride=5, aggregate='max'" in repr(runtime)
    for same in (
        pickle.loads(pickle.dumps(runtime)),
        runtime.recipe().open(),
        runtime.with_members(None),
        runtime.with_exit_rule(runtime.exit_rule),
        CascadeRuntime(replace(runtime.plan)),
    ):
        assert same.predict(LONG) == expected
    journey = runtime.begin(TEXTS)
    for member in range(len(runtime.bundle.members)):
        journey = pickle.loads(pickle.dumps(journey))
        runtime.advance(journey, member)
    assert runtime.finish(journey) == runtime.predict(TEXTS)
    assert list(runtime.predict_iter(iter(TEXTS), chunk_size=4))[-1] == runtime.predict(TEXTS[-3:])[-1]


def test_pairs_are_answered_too(tmp_path: Path) -> None:
    folder = write_bundle(
        tmp_path / "pairs", cascade_members(pair=True), thresholds=[0.7], pair=True, max_length=LENGTH
    )
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE)
    texts: list[Text] = [(one, two) for one, two in pairwise(TEXTS)]
    answers = runtime.predict(texts)
    assert {answer.truncated for answer in answers} == {False, True}
    plain = library(folder)
    plain.no_truncation()
    for text, answer in zip(texts, answers, strict=True):
        one, two = (plain.encode(part, add_special_tokens=False).ids for part in text)
        wanted, cut = pair_windows(one, two, left=False)
        assert answer.truncated == cut
        assert answer.layers == len(wanted) * (2, 6)[answer.exit]
        assert runtime.predict([text])[0].probabilities == pytest.approx(answer.probabilities, abs=1e-5)


def assert_same(found: Sequence[Any], expected: Sequence[Prediction]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.label, one.exit, one.layers, one.truncated) == (
            other.label,
            other.exit,
            other.layers,
            other.truncated,
        )
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_the_server_answers_as_predict_does(folder: Path) -> None:
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE, aggregate="max")
    own = Settings(execution=Execution(threads=1), stride=STRIDE, aggregate="max", max_texts=60, max_queue=200)
    service = Service({"toy": str(folder)}, own)
    with listening(service) as address, Client(f"http://{address}") as client:
        assert_same(client.classify(TEXTS), runtime.predict(TEXTS))
        many = TEXTS * 4
        assert sum(len(windows(library(folder), text)) for text in many) > 60
        with pytest.raises(ServerError, match=r"windows, which count as texts, expected at most 60"):
            client.classify(many)
        assert_same(list(client.stream(many)), runtime.predict(many))
        huge = " ".join(LONG * 3)
        with pytest.raises(ServerError, match="windows, which count as texts"):
            list(client.stream(["a film", huge]))
        raw = httpx.post(f"http://{address}/predict", json={"inputs": LONG[0], "truncate": False})
        assert raw.status_code == 200, "it is not cut"
        (served,) = httpx.get(f"http://{address}/v1/models").json()["models"]
        assert (served["stride"], served["aggregate"]) == (STRIDE, "max")
        assert service.models.get().runtime.stats().mean_layers > 0
        assert service.models.get().batcher.queued() == [0] * len(runtime.bundle.members)
    service.close()


def test_windows_count_in_the_queue(folder: Path) -> None:
    runtime = CascadeRuntime(folder, threads=1, stride=STRIDE)
    batcher = Batcher(runtime, max_queue=10)
    try:
        encoded = runtime.plan.encode(LONG)
        batcher._accepted = 1
        with pytest.raises(Overloaded):
            batcher.submit(encoded)
        batcher._accepted = 0
        ticket = batcher.submit(encoded)
        batcher.cancel(ticket)
        assert batcher._accepted == 0
    finally:
        batcher.close()


def test_the_command_line_reads_long_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = with_bag(tmp_path / "bundle")
    status, found, _ = run(capsys, "predict", "--model-dir", folder, "--stride", STRIDE, "--aggregate", "max", *LONG)
    expected = CascadeRuntime(folder, stride=STRIDE, aggregate="max").predict(LONG)
    assert status == 0
    assert [(row["label"], row["exit"], row["layers"], row["truncated"]) for row in found] == [
        (answer.label, answer.exit, answer.layers, False) for answer in expected
    ]
    for options, said in (
        (("--aggregate", "max"), "--aggregate: found 'max', expected a stride with it"),
        (("--stride", "14"), "--stride: found 14, expected from 0 to 13, as this bundle takes 16 tokens"),
        (("--stride", "-1"), "--stride: found -1, expected a whole number of tokens from 0"),
    ):
        status, _, error = run(capsys, "predict", "--model-dir", folder, *options, "a film")
        assert (status, error.count("\n")) == (2, 1)
        assert said in error
    source = tmp_path / "in.txt"
    source.write_text("\n".join(LONG) + "\n")
    job = ("predict", "--model-dir", folder, "--input", source, "--output", "out.jsonl")
    assert run(capsys, *job, "--stride", STRIDE)[0] == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["layers"] for row in rows] == [
        answer.layers for answer in CascadeRuntime(folder, stride=STRIDE).predict(LONG)
    ]


def test_thresholds_are_tuned_for_windows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cascade_rt.tuning.operating_points._POINTS", 100)
    monkeypatch.setattr("cascade_rt.tuning.operating_points._SHARES", (0.1,))
    monkeypatch.setattr("cascade_rt.tuning.collect._TIMED", 5)
    folder = write_bundle(tmp_path / "bundle", cascade_members(), thresholds=[0.8, 0.8], max_length=LENGTH)
    texts = [f"{text} {word}" for text in LONG for word in WORDS[:6]]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    options = ["tune", "--model-dir", str(folder), "--input", str(file), "--agreement", "--cost", "layers"]
    options += ["--max-drop", "0.2", "--json"]
    assert main([*options, "--stride", str(STRIDE), "--aggregate", "max"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["data"]["stride"], report["data"]["aggregate"]) == (STRIDE, "max")
    runtime = CascadeRuntime(folder, stride=STRIDE, aggregate="max")
    answers = runtime.predict(texts)
    exits = [answer.exit for answer in answers]
    assert report["chosen"]["exits"] == [exits.count(at) for at in range(len(runtime.bundle.members))]
    whole = runtime.with_members(["big"]).predict(texts)
    executed = sum(answer.layers for answer in answers)
    assert report["chosen"]["layers_speedup"] == pytest.approx(sum(answer.layers for answer in whole) / executed)
    agree = np.mean([one.label == other.label for one, other in zip(answers, whole, strict=True)])
    assert report["chosen"]["accuracy"] == pytest.approx(agree)
    assert runtime.stats().p_value is not None
    for other in (runtime.with_stride(None), runtime.with_stride(STRIDE), runtime.with_stride(0, "max")):
        other.predict(texts)
        assert other.stats().p_value is None, "other windows, so other exits than those of tuning"
    main(["info", "--model-dir", str(folder)])
    assert "long texts  tuned with the stride 5 and the aggregate max" in capsys.readouterr().out
    assert main(options) == 0
    assert json.loads(capsys.readouterr().out)["data"].keys() == {"texts", "sha256"}, "as before there were windows"
    assert CascadeRuntime(folder).bundle.tuning is not None
    cutting = CascadeRuntime(folder)
    cutting.predict(texts)
    assert cutting.stats().p_value is not None
