"""Multi-exit models: trained on tiny encoders, exported as segments, equal to torch in one piece at every exit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cascade_export.check import Check
from cascade_export.exits import export_exits
from cascade_train import RECORD
from cascade_train.exits import DEEBERT, FASTBERT, KINDS, PABEE, MultiExitClassifier, exit_loss, open_exits, train_exits
from cascade_train.finetune import Recipe, finetune
from cascade_train.inference import text_logits
from cascade_train.tasks import Examples, TaskData
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cascade_rt import CascadeRuntime, InputError, InvalidOption, read_bundle
from cascade_rt.engine.task import SingleLabel
from cascade_rt.types import Text

from ..conftest import WORDS, make_member

TASK = SingleLabel()

RECIPE = Recipe(epochs=4, learning_rate=3e-3, batch_size=8, max_length=16)
LAYERS = 3
ANY_LOSS = Check(max_accuracy_drop=100)


@pytest.fixture(scope="module")
def data() -> TaskData:
    """Texts whose first word tells the class."""
    draw = np.random.default_rng(0)
    labels = [row % 2 for row in range(80)]
    texts = [" ".join([("bad", "good")[label], *draw.choice(WORDS, draw.integers(1, 9))]) for label in labels]
    examples = Examples(texts, labels)
    return TaskData("toy", ("bad", "good"), False, "accuracy", examples.take(range(64)), examples.take(range(64, 80)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_member(tmp_path_factory.mktemp("base") / "3L", layers=LAYERS, spread=0.1))


@pytest.fixture(scope="module")
def member(base: str, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("member") / "3L"
    finetune(base, data, folder, recipe=RECIPE)
    return str(folder)


@pytest.fixture(scope="module")
def trained(base: str, member: str, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exits")
    for kind in KINDS:
        train_exits(base if kind == PABEE else member, data, root / kind, kind=kind, recipe=RECIPE)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", [DEEBERT, FASTBERT])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_flops_of_an_exit_are_those_that_torch_counts(kind: str, tokens: int, trained: dict[str, Path]) -> None:
    head = open_exits(trained[kind]).exits[0]
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(1, tokens, 32), torch.ones(1, tokens))
    assert counter.get_total_flops() == np.polynomial.polynomial.polyval(tokens, head.flops)


def one_piece(folder: Path, texts: Sequence[Text]) -> np.ndarray:
    """The probabilities of every exit, (exits, texts, labels), from torch in one piece, text by text."""
    whole, tokenizer = open_exits(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        rows = [whole(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")) for text in texts]
    return TASK.probabilities(torch.cat(rows, dim=1).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_answers_as_torch_in_one_piece(kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    bundle = export_exits(str(trained[kind]), tmp_path / "bundle")
    texts = ["a film", "", "good " * 30, *["so", "bad", "it", "is", "good", ",", "this", "film"], "never a dull cat"]
    found = TASK.probabilities(CascadeRuntime(tmp_path / "bundle").member_logits(texts)[0])
    np.testing.assert_allclose(found, one_piece(trained[kind], texts), atol=1e-5)
    assert bundle.exit_rule["kind"] == ("patience" if kind == PABEE else "entropy")
    assert [entry.layers for entry in bundle.members] == [1, 1, 1]
    assert [bool(entry.exit_flops) for entry in bundle.members] == [True, True, False]
    assert read_bundle(tmp_path / "bundle").members == bundle.members
    assert all(entry.other["max_probability_difference"] <= 1e-4 for entry in bundle.members)
    assert all(entry.other["check"]["labels_agree"] == 1 for entry in bundle.members)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_learn(kind: str, trained: dict[str, Path], data: TaskData) -> None:
    right = one_piece(trained[kind], data.validation.texts).argmax(axis=-1) == np.array(data.validation.labels)
    assert right.mean(axis=1).min() >= 0.8, "each exit sees the word that tells the class"
    record = json.loads((trained[kind] / RECORD).read_text("utf-8"))
    best = max(record["validation"]["history"], key=lambda entry: float(entry["eval_accuracy"]))
    assert best["eval_exits"] == pytest.approx(right.mean(axis=1).tolist())


@pytest.mark.parametrize("kind", [DEEBERT, FASTBERT])
def test_a_fine_tuned_model_stays_as_it_is(kind: str, trained: dict[str, Path], member: str, data: TaskData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(member)
    before, after = (
        text_logits(tokenizer, AutoModelForSequenceClassification.from_pretrained(folder), data.train.texts, 16)
        for folder in (member, str(trained[kind]))
    )
    np.testing.assert_array_equal(before, after)


def test_an_encoder_is_fine_tuned_first(base: str, data: TaskData, tmp_path: Path) -> None:
    train_exits(base, data, tmp_path / "exits", kind=DEEBERT, recipe=RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["exits"]
    right = one_piece(tmp_path / "exits", data.validation.texts).argmax(axis=-1) == data.validation.labels
    assert right[-1].mean() >= 0.8


def test_segments_have_several_layers(member: str, data: TaskData, tmp_path: Path) -> None:
    train_exits(member, data, tmp_path / "exits", kind=DEEBERT, every=2, recipe=RECIPE)
    bundle = export_exits(str(tmp_path / "exits"), tmp_path / "bundle")
    assert [entry.layers for entry in bundle.members] == [2, 1]
    found = TASK.probabilities(CascadeRuntime(tmp_path / "bundle").member_logits(["a good film"])[0])
    np.testing.assert_allclose(found, one_piece(tmp_path / "exits", ["a good film"]), atol=1e-5)


def test_in_int8_no_answer_depends_on_the_batch(trained: dict[str, Path], data: TaskData, tmp_path: Path) -> None:
    bundle = export_exits(str(trained[FASTBERT]), tmp_path / "bundle", precision="int8", check=ANY_LOSS)
    assert [entry.other["batch_difference"] for entry in bundle.members] == [0.0] * LAYERS
    runtime, texts = CascadeRuntime(tmp_path / "bundle"), data.train.texts
    together = runtime.member_logits(texts)[0]
    first = runtime.exit_rule.observed(TASK, TASK.probabilities(together))[0]
    runtime = runtime.with_thresholds(float(np.median(first)))
    alone = np.concatenate([runtime.member_logits([text])[0] for text in texts], axis=1)
    np.testing.assert_array_equal(alone, together)
    answers = runtime.predict(texts)
    assert len({answer.exit for answer in answers}) > 1
    assert [runtime.predict([text])[0].exit for text in texts] == [answer.exit for answer in answers]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_the_loss_is_that_of_the_papers(seed: int, kind: str) -> None:
    draw = np.random.default_rng(seed)
    logits, labels, after, layers = draw.normal(0, 2, (3, 5, 4)), draw.integers(0, 4, 5), [2, 4], 6
    probabilities = TASK.probabilities(logits)
    entropy = [-np.log(exit[range(5), labels]).mean() for exit in probabilities]
    last = probabilities[-1]
    divergence = [(last * (np.log(last) - np.log(exit))).sum(axis=-1).mean() for exit in probabilities]
    expected = {
        DEEBERT: entropy[0] + entropy[1],
        PABEE: (2 * entropy[0] + 4 * entropy[1] + 6 * entropy[2]) / 12,
        FASTBERT: divergence[0] + divergence[1],
    }[kind]
    found = exit_loss(torch.tensor(logits), torch.tensor(labels), kind, after, layers)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bad_settings_are_refused(member: str, data: TaskData, trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="`kind`: found 'other', expected one of deebert, pabee, fastbert"):
        train_exits(member, data, tmp_path / "exits", kind="other", recipe=RECIPE)
    with pytest.raises(InvalidOption, match="`every`: found 3, expected 1 to 2"):
        train_exits(member, data, tmp_path / "exits", kind=PABEE, every=3, recipe=RECIPE)
    with pytest.raises(InputError, match="exists; choose another output folder"):
        train_exits(member, data, trained[PABEE], kind=PABEE, recipe=RECIPE)
    with pytest.raises(InputError, match="cannot be opened .*train-exits"):
        open_exits(member)
    expected = "`precision`: found 'int8-static', expected one of fp32, fp16, fp32-int8-words"
    with pytest.raises(InvalidOption, match=expected):
        export_exits(str(trained[PABEE]), tmp_path / "bundle", precision="int8-static", check=ANY_LOSS)
    with pytest.raises(InvalidOption, match="`exporter`: found 'optimum', expected trace for segments"):
        export_exits(str(trained[PABEE]), tmp_path / "bundle", check=Check(exporter="optimum"))
    assert isinstance(open_exits(trained[PABEE]), MultiExitClassifier)
