"""The compressed rivals of the paper: patient distillation (BERT-PKD) and module replacing (BERT-of-Theseus)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascade_train import finetune as module
from cascade_train.compat import MAJOR
from cascade_train.finetune import (
    Objective,
    ObjectiveTrainer,
    Recipe,
    TeacherStates,
    finetune,
    load_base,
    load_member,
    patient_layers,
    teacher_states,
)
from cascade_train.inference import collator, features
from cascade_train.losses import patient_distillation
from cascade_train.tasks import Examples, TaskData
from cascade_train.theseus import ModuleReplacing, replacement_rate
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, TrainerCallback

from cascade_rt.cli import main
from cascade_rt.errors import InputError, InvalidOption

from ..cascade_export.families import FAMILIES
from ..conftest import LABELS, WORDS, make_member

RECIPE = Recipe(epochs=6, learning_rate=3e-3, batch_size=8, max_length=16, evaluations_per_epoch=2)


@pytest.fixture(scope="module")
def data() -> TaskData:
    texts = [f"{WORDS[index % 20]} {'good' if index % 2 else 'bad'} {WORDS[(index * 7) % 30]}" for index in range(80)]
    labels = [index % 2 for index in range(80)]
    train, validation = Examples(texts[:64], labels[:64]), Examples(texts[64:], labels[64:])
    return TaskData("toy", ("bad", "good"), False, "accuracy", train, validation)


@pytest.fixture(scope="module")
def big(data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fine-tuned member of 4 layers."""
    root = tmp_path_factory.mktemp("big")
    base = make_member(root / "base", layers=4, spread=0.05, labels=data.labels)
    finetune(str(base), data, root / "4L", recipe=RECIPE)
    return str(root / "4L")


def test_patient_layers_are_those_of_the_paper() -> None:
    assert patient_layers(12, 6, "skip") == [2, 4, 6, 8, 10]
    assert patient_layers(12, 6, "last") == [7, 8, 9, 10, 11]
    assert patient_layers(12, 3, "skip") == [4, 8]
    with pytest.raises(InvalidOption, match="found 1, expected 2 to 12"):
        patient_layers(12, 1, "skip")


@given(st.integers(2, 24), st.integers(2, 24), st.sampled_from(["skip", "last"]))
def test_patient_layers_ascend_below_the_last(deep: int, layers: int, strategy: str) -> None:
    layers = min(deep, layers)
    found = patient_layers(deep, layers, strategy)
    assert len(found) == layers - 1
    assert found == sorted(set(found))
    assert all(1 <= layer < deep for layer in found)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_the_patient_loss_is_two_minus_twice_the_cosine(batch: int, layers: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    ours, theirs = random.normal(size=(2, batch, layers, 5))
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    loss = patient_distillation(torch.tensor(ours), torch.tensor(theirs))
    assert loss.item() == pytest.approx((2 - 2 * cosines).mean(), abs=1e-5)


def test_the_states_are_those_of_the_first_token(data: TaskData, big: str) -> None:
    found = teacher_states(big, data, RECIPE, 2)
    assert list(found.layers) == [2]
    tokenizer, model = load_member(big, data.labels, "teacher")
    for row in (0, 7, 63):
        batch = tokenizer(data.train.texts[row], return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states[2][0, 0]
        np.testing.assert_allclose(found.states[row, 0], states, atol=5e-3)


def test_a_patient_student_comes_closer_to_its_teacher(data: TaskData, big: str, tmp_path: Path) -> None:
    states = teacher_states(big, data, RECIPE, 2)
    distances = {}
    # A student that starts elsewhere: the first layers of the teacher itself are near from the start.
    base = str(make_member(tmp_path / "other", layers=2, spread=0.05, seed=5))
    for name, objective in {"alone": Objective(), "patient": Objective(patient=states, patient_weight=3.0)}.items():
        record = finetune(base, data, tmp_path / name, layers=2, recipe=RECIPE, objective=objective)
        ours = teacher_states(str(tmp_path / name), data, RECIPE, 2, "last")
        theirs = torch.tensor(states.states[:, :1].astype(np.float32))
        distances[name] = patient_distillation(torch.tensor(ours.states.astype(np.float32)), theirs).item()
    assert record["objective"] == {"patient": {"weight": 3.0, "layers": [2]}}
    assert distances["patient"] < 0.5 * distances["alone"]


def test_states_of_another_shape_are_refused(data: TaskData, big: str, tmp_path: Path) -> None:
    states = TeacherStates([2], np.zeros((64, 1, 16), dtype=np.float16))
    with pytest.raises(InvalidOption, match=r"found \[1, 16\], expected \[1, 32\]"):
        finetune(big, data, tmp_path / "m", layers=2, recipe=RECIPE, objective=Objective(patient=states))
    assert not list(tmp_path.iterdir())


def test_the_rate_rises_to_one_and_stays() -> None:
    rates = [replacement_rate(done / 10) for done in range(11)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[3] < 1 == rates[6] == rates[10]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "albert"])
def test_modules_take_turns_in_every_family(family: str, tmp_path: Path) -> None:
    """With no module replaced the successor computes what the predecessor does; with all of them, its own."""
    folder = str(FAMILIES[family](tmp_path / "deep"))
    _, predecessor = load_base(folder, LABELS, None)
    tokenizer, successor = load_base(folder, LABELS, 1)
    batch = collator(tokenizer)(features(tokenizer, successor, Examples(["good film", "bad"], [0, 1]), 16))
    for model in (predecessor, successor):
        for dropout in [part for part in model.modules() if isinstance(part, torch.nn.Dropout)]:
            dropout.p = 0.0
    before = successor(**batch).logits
    names = set(successor.state_dict())
    if (
        MAJOR > 4 and predecessor.config.model_type == "modernbert"
    ):  # a layer of global attention would stand for one of local
        with pytest.raises(
            InputError, match="has full_attention and sliding_attention in layers that would take turns"
        ):
            ModuleReplacing(predecessor, successor)
        return
    replacing = ModuleReplacing(predecessor, successor)
    successor.train()
    for replaced, expected in ((False, predecessor(**batch).logits), (True, before)):
        replacing.replaced[:] = replaced
        torch.testing.assert_close(successor(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    successor.eval()
    replacing.replaced[:] = False
    torch.testing.assert_close(successor(**batch).logits, before, atol=1e-5, rtol=1e-5)
    assert set(successor.state_dict()) == names, "the predecessor's weights are not the successor's"


def test_shared_layers_cannot_be_replaced(tmp_path: Path) -> None:
    folder = str(FAMILIES["albert"](tmp_path / "deep"))
    with pytest.raises(InputError, match="no list of layers"):
        ModuleReplacing(load_member(folder, LABELS, "base")[1], load_base(folder, LABELS, 1)[1])


def test_only_the_successors_layers_are_trained(data: TaskData, big: str, tmp_path: Path) -> None:
    record = finetune(big, data, tmp_path / "2L", layers=2, module_replacing=True, recipe=RECIPE)
    assert (record["module_replacing"], record["layers"]) == (True, 2)
    assert record["validation"]["best"] > 0.8
    old = load_member(big, data.labels, "base")[1].state_dict()
    new = load_member(str(tmp_path / "2L"), data.labels, "base")[1].state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed
    assert changed <= {name for name in new if ".layer." in name}


def test_a_killed_replacement_resumes_and_ends_where_it_would_have_ended(
    data: TaskData, big: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 27:
                raise Killed

    class Watched(ObjectiveTrainer):
        def __init__(self, objective: Objective, **arguments: Any) -> None:
            super().__init__(objective, **arguments, callbacks=[Kill()])

    finetune(big, data, tmp_path / "straight", layers=2, module_replacing=True, recipe=RECIPE)
    with monkeypatch.context() as patched:
        patched.setattr(module, "ObjectiveTrainer", Watched)
        with pytest.raises(Killed):
            finetune(big, data, tmp_path / "m", layers=2, module_replacing=True, recipe=RECIPE)
    finetune(big, data, tmp_path / "m", layers=2, module_replacing=True, recipe=RECIPE)
    one, other = (load_member(str(tmp_path / name), data.labels, "base")[1] for name in ("straight", "m"))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], atol=1e-6, rtol=0)


def test_a_replacement_that_cannot_be_is_refused(data: TaskData, big: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="found 4, expected fewer than the 4 layers"):
        finetune(big, data, tmp_path / "a", module_replacing=True, recipe=RECIPE)
    with pytest.raises(InvalidOption, match="the member has its own"):
        finetune(big, data, tmp_path / "b", layers=2, tokenizer=big, module_replacing=True, recipe=RECIPE)
    other = replace(data, labels=("no", "yes"))
    with pytest.raises(InvalidOption, match="a member with the labels no, yes"):
        finetune(big, other, tmp_path / "c", layers=2, module_replacing=True, recipe=RECIPE)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_both(data: TaskData, big: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = zip(data.train.texts, data.train.labels, strict=True)
    Path("data.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": data.labels[label]}) + "\n" for text, label in rows)
    )
    shared = f"--base {big} --train-file data.jsonl --layers 3 --epochs 1 --max-length 16"
    assert main(["train", *shared.split(), "--teacher", big, "--patient", "last", "--output", "pkd"]) == 0
    assert "patient (weight 0.5, layers [2, 3])" in capsys.readouterr().out
    assert main(["train", *shared.split(), "--module-replacing", "--output", "theseus"]) == 0
    assert AutoTokenizer.from_pretrained("theseus").vocab_size
    for wrong, says in ((["--patient", "skip"], "--teacher"), (["--module-replacing"], "--layers")):
        arguments = f"--base {big} --train-file data.jsonl --output m".split()
        assert main(["train", *arguments, *wrong]) == 2
        assert says in capsys.readouterr().err
