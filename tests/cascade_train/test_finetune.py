"""Fine-tuning: what comes out, what resumes, what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cascade_train import RECORD, VALIDATION
from cascade_train import finetune as module
from cascade_train.compat import quiet
from cascade_train.finetune import Objective, ObjectiveTrainer, Recipe, finetune, load_base
from cascade_train.sources import load_classifier, pretrained
from cascade_train.tasks import Examples, TaskData
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError, InvalidOption

from ..cascade_export.families import FAMILIES
from ..conftest import LABELS, WORDS, make_member

RECIPE = Recipe(epochs=4, learning_rate=3e-3, batch_size=8, max_length=16, evaluations_per_epoch=2)


@pytest.fixture(scope="module")
def data() -> TaskData:
    """Tell texts with "good" from texts with "bad": learnable by a tiny model."""
    texts = [f"{WORDS[index % 20]} {'good' if index % 2 else 'bad'} {WORDS[(index * 7) % 30]}" for index in range(80)]
    labels = [index % 2 for index in range(80)]
    return TaskData(
        "toy", ("bad", "good"), False, "accuracy", Examples(texts[:64], labels[:64]), Examples(texts[64:], labels[64:])
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 4-layer encoder to start from."""
    return str(make_member(tmp_path_factory.mktemp("base") / "4L", layers=4, spread=0.05))


@pytest.fixture(scope="module")
def trained(base: str, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "2L"
    finetune(base, data, output, layers=2, recipe=RECIPE)
    return output


def test_the_output_is_a_normal_hugging_face_folder(trained: Path, data: TaskData) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    assert model.config.id2label == {0: "bad", 1: "good"}
    batch = tokenizer(data.validation.texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        predicted = model(**batch).logits.argmax(-1).tolist()
    record = json.loads((trained / RECORD).read_text("utf-8"))
    accuracy = sum(a == b for a, b in zip(predicted, data.validation.labels, strict=True)) / len(predicted)
    assert record["validation"]["best"] == pytest.approx(accuracy), "the best checkpoint is the one that was kept"
    assert accuracy == max(entry["eval_accuracy"] for entry in record["validation"]["history"]) > 0.8
    assert (record["pair"], record["max_length"], record["layers"]) == (False, 16, 2)
    held = [json.loads(line) for line in (trained / VALIDATION).read_text("utf-8").splitlines()]
    assert held[0] == {"text": data.validation.texts[0], "label": data.labels[data.validation.labels[0]]}
    assert not list(trained.parent.glob("*.training"))
    assert not list(trained.glob("*.bin")), "no pickles"


def test_the_first_k_layers_start_from_the_bases_weights(base: str, data: TaskData, tmp_path: Path) -> None:
    still = Recipe(epochs=1, learning_rate=0.0, batch_size=64, max_length=16)
    finetune(base, data, tmp_path / "k", layers=3, recipe=still)
    whole, cut = weights(Path(base)), weights(tmp_path / "k")
    encoder = [name for name in cut if "classifier" not in name]
    assert not [name for name in cut if ".layer.3." in name]
    assert all(torch.equal(whole[name], cut[name]) for name in encoder)
    assert cut["classifier.weight"].shape == (2, 32)


class _Killed(BaseException):
    pass


class _KillAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise _Killed


def test_the_first_layers_of_a_modernbert_are_a_checkpoint_again(tmp_path: Path) -> None:
    """transformers 5 wants a kind of attention for each layer, and says so when it saves."""
    _, model = load_base(str(FAMILIES["modernbert"](tmp_path / "deep")), LABELS, 1)
    with quiet():
        model.save_pretrained(tmp_path / "cut")
    again = load_classifier(str(tmp_path / "cut"))
    assert again.config.num_hidden_layers == 1
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6, rtol=1e-6)


def test_a_killed_run_resumes_and_ends_where_it_would_have_ended(
    base: str, data: TaskData, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    class Watched(ObjectiveTrainer):
        def __init__(self, objective: Objective, **arguments: Any) -> None:
            super().__init__(objective, **arguments, callbacks=[_KillAt(19)])

        def training_step(self, *arguments: Any) -> Any:
            steps.append(self.state.global_step)
            return super().training_step(*arguments)

    output, work = tmp_path / "2L", tmp_path / "2L.training"
    monkeypatch.setattr(module, "ObjectiveTrainer", Watched)
    with pytest.raises(_Killed):
        finetune(base, data, output, layers=2, recipe=RECIPE)
    assert not output.exists()
    (work / "checkpoint-18").mkdir()  # what a kill leaves in the middle of writing one
    steps.clear()
    monkeypatch.setattr(_KillAt, "on_step_end", lambda *_, **__: None)
    finetune(base, data, output, layers=2, recipe=RECIPE)
    assert steps[0] == 16, "it goes on from the last whole checkpoint"
    assert not work.exists()
    resumed, straight = weights(output), weights(trained)
    assert all(torch.allclose(resumed[name], straight[name], atol=1e-6) for name in straight)


def test_another_runs_work_is_not_continued(base: str, data: TaskData, tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    (work / "checkpoint-4").mkdir(parents=True)
    (work / "run.json").write_text('{"base": "another"}')
    with pytest.raises(CascadeError, match=r"unfinished run with another base \(found another"):
        finetune(base, data, tmp_path / "out", recipe=RECIPE)


def test_a_run_that_cannot_be_is_refused(base: str, data: TaskData, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists; choose another"):
        finetune(base, data, trained, recipe=RECIPE)
    with pytest.raises(InputError, match="`layers`: found 5, expected 1 to 4"):
        finetune(base, data, tmp_path / "a", layers=5, recipe=RECIPE)
    with pytest.raises(InputError, match="^no/such: no such folder; .* hub it would be hf:no/such"):
        finetune("no/such", data, tmp_path / "b", recipe=RECIPE)
    for path in (str(tmp_path / "no"), "./no", "hf:no such"):
        with pytest.raises(InputError, match=f"^{path}: no such folder; check the path$"):
            finetune(path, data, tmp_path / "b", recipe=RECIPE)
    with pytest.raises(InputError, match="config.json: found a file; expected the folder of a model: "):
        finetune(f"{trained}/config.json", data, tmp_path / "b", recipe=RECIPE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="/empty: the folder has no config.json"):
        finetune(str(tmp_path / "empty"), data, tmp_path / "b", recipe=RECIPE)
    (tmp_path / "empty").rmdir()
    with pytest.raises(InputError, match="`max_length`: found 65, expected at most 64"):
        finetune(base, data, tmp_path / "c", recipe=Recipe(max_length=65))
    assert list(tmp_path.iterdir()) == [], "a corrected command finds nothing in its way"


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": float("nan")},
        {"learning_rate": -1},
        {"batch_size": 0},
        {"max_length": 2},
        {"warmup_ratio": 2},
        {"weight_decay": -0.1},
        {"seed": -1},
        {"evaluations_per_epoch": 0},
    ],
)
def test_an_invalid_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="found .*, expected a number from") as refused:
        Recipe(**wrong)
    assert refused.value.field == next(iter(wrong))


def test_the_best_checkpoint_is_kept_and_not_the_last(
    base: str, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.1, 0.9, 0.2, 0.3])
    monkeypatch.setattr(module, "_measured", lambda *_: {"accuracy": next(accuracies)})
    seen: list[dict[str, torch.Tensor]] = []

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.append({name: weight.clone() for name, weight in model.state_dict().items()})

    class Watched(ObjectiveTrainer):
        def __init__(self, objective: Objective, **arguments: Any) -> None:
            super().__init__(objective, **arguments, callbacks=[Watcher()])

    monkeypatch.setattr(module, "ObjectiveTrainer", Watched)
    recipe = Recipe(epochs=4, learning_rate=3e-3, batch_size=8, max_length=16)
    assert finetune(base, data, tmp_path / "m", layers=1, recipe=recipe)["validation"]["best"] == 0.9
    kept = weights(tmp_path / "m")
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[3][name]) for name in kept)


def test_batches_hold_texts_of_like_length(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(["good"] * (2 + 53 * index % 29)) for index in range(640)]
    examples = Examples(texts, [index % 2 for index in range(640)])
    filled: list[float] = []

    class Watched(ObjectiveTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            filled.append(float(inputs["attention_mask"].float().mean()))
            return super().training_step(model, inputs, *rest)

    monkeypatch.setattr(module, "ObjectiveTrainer", Watched)
    data = TaskData("lengths", ("a", "b"), False, "accuracy", examples, examples.take(range(8)))
    finetune(base, data, tmp_path / "m", layers=1, recipe=Recipe(epochs=1, batch_size=16, max_length=32))
    assert sum(filled) / len(filled) > 0.9, "at random about half would be padding"


def test_the_command_trains_on_a_pair_file(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{WORDS[index % 20]},{WORDS[index % 7]},{'same' if index % 2 else 'other'}" for index in range(40)]
    (tmp_path / "data.csv").write_text("\n".join(["q1,q2,y", *lines]))
    arguments = f"--base {base} --train-file data.csv --text-column q1 --pair-column q2 --label-column y "
    arguments += "--output out/member --epochs 1 --max-length 16"
    assert main(["train", *arguments.split()]) == 0
    assert "out/member: data, 36 training and 4 validation examples" in capsys.readouterr().out
    record = json.loads(Path("out/member", RECORD).read_text("utf-8"))
    assert (record["pair"], record["labels"], record["task"]) == (True, ["other", "same"], "data")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--base x --output y", "found neither --task nor --train-file"),
        ("--base x --output y --task rte --train-file z.csv", "found --task and --train-file"),
        ("--base x --output y --train-file z.csv --pair-column b", "requires --text-column"),
        ("--base x --output y --task cola", "invalid choice: 'cola'"),
        ("--task rte", "--base"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_only_names_with_the_prefix_are_looked_for_on_the_hub(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return base

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for source in ("hf:bert-base-uncased", "hf:org/name@v1.2", "org/name", "bert-base-uncased", "hf:../x", "hf:"):
        with contextlib.suppress(InputError):
            pretrained(AutoConfig, source)
    settings = ["*.json", "*.txt", "*.model"]
    assert asked == [("bert-base-uncased", None, settings), ("org/name", "v1.2", settings)]
    asked.clear()
    assert load_base("hf:org/name", ("a", "b"), 1)[1].config.num_hidden_layers == 1
    assert {tuple(patterns) for *_, patterns in asked} == {tuple(settings), ("model*.safetensors",)}, (
        "no pickled weights"
    )


def test_a_hub_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(InputError, match="^hf:org/name: cannot be downloaded from the Hugging Face hub .*the network"):
        pretrained(AutoConfig, "hf:org/name")
