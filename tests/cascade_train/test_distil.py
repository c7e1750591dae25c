"""General distillation: which layers a student starts from, what it learns, what resumes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascade_train import RECORD, hardware
from cascade_train import distil as module
from cascade_train.distil import (
    Distillation,
    DistillationTrainer,
    Tokenized,
    distil,
    load_encoder,
    make_student,
    pick_layers,
    projections,
)
from cascade_train.losses import hidden_state_error, mean_vector_cosine, relation_divergence
from hypothesis import given
from hypothesis import strategies as some
from numpy.typing import NDArray
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    TrainerCallback,
)

from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.readers import Reading

from ..conftest import WORDS, make_member

RECIPE = Distillation(steps=30, learning_rate=3e-3, batch_size=16, max_length=16, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products take longer with more threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(seed: int, count: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 4-layer classifier; what is distilled is its encoder."""
    return str(make_member(tmp_path_factory.mktemp("base") / "4L", layers=4, spread=0.1))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(sentences(0, 320)))
    return path


@pytest.fixture(scope="module")
def distilled(base: str, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("distilled") / "2L"
    distil(base, [texts], output, layers=2, recipe=RECIPE)
    return output


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return dict(AutoModel.from_pretrained(folder).state_dict())


@given(some.integers(2, 96).flatmap(lambda deep: some.tuples(some.just(deep), some.integers(2, deep))))
def test_layers_are_picked_across_the_depth(depth: tuple[int, int]) -> None:
    deep, layers = depth
    picked = pick_layers(deep, layers)
    gaps = np.diff(picked)
    assert len(picked) == layers
    assert (picked[0], picked[-1]) == (0, deep - 1)
    assert gaps.min() >= 1, "ascending and distinct"
    assert gaps.max() - gaps.min() <= 1, "evenly spread"


def test_known_choices_of_layers() -> None:
    assert [pick_layers(12, layers) for layers in (1, 2, 3, 4)] == [[11], [0, 11], [0, 6, 11], [0, 4, 7, 11]]


def test_the_student_comes_closer_to_the_teacher_on_other_texts(base: str, distilled: Path) -> None:
    tokenizer, teacher = load_encoder(base)
    others = sorted(set(sentences(1, 200)) - set(sentences(0, 320)))
    batch = dict(tokenizer(others, padding=True, return_tensors="pt", return_token_type_ids=False))
    mask = batch["attention_mask"].numpy().astype(bool)

    def states(model: Any) -> NDArray[np.float64]:
        with torch.inference_mode():
            found: NDArray[np.float64] = model.eval()(**batch).last_hidden_state.double().numpy()[mask]
        return found

    target = states(teacher)
    variance = target.var(axis=0).mean()

    def error(model: Any) -> float:
        return float(np.mean((states(model) - target) ** 2) / variance)

    truncated, learned = error(make_student(teacher, [0, 3], base)), error(AutoModel.from_pretrained(distilled))
    assert learned < 0.3 * truncated < 0.3, "even the truncated one is better than the best constant, whose error is 1"
    record = json.loads((distilled / RECORD).read_text("utf-8"))
    history = record["validation"]["history"]
    assert [entry["step"] for entry in history] == list(range(0, 31, 3))
    assert history[0]["eval_mse"] == pytest.approx(truncated, rel=0.3), "the held-out texts are other ones"
    assert record["validation"]["mse"] == history[-1]["eval_mse"] == pytest.approx(learned, rel=0.3)
    assert history[-1]["eval_cosine"] > history[0]["eval_cosine"]


def test_the_output_is_a_normal_encoder_folder(base: str, distilled: Path) -> None:
    model = AutoModel.from_pretrained(distilled)
    assert model.config.num_hidden_layers == len(model.encoder.layer) == 2
    tokenizer = AutoTokenizer.from_pretrained(distilled)
    assert tokenizer("a good film")["input_ids"] == AutoTokenizer.from_pretrained(base)("a good film")["input_ids"]
    record = json.loads((distilled / RECORD).read_text("utf-8"))
    assert (record["layers"], record["picked"], record["steps"], record["bf16"]) == (2, [0, 3], 30, False)
    assert record["texts"]["training"] + record["texts"]["validation"] == len(set(sentences(0, 320)))
    assert not list(distilled.parent.glob("*.training"))


def test_only_the_layers_are_trained(base: str, distilled: Path) -> None:
    big, small = weights(base), weights(distilled)
    still = [name for name in small if ".layer." not in name]
    assert {name.split(".")[0] for name in still} == {"embeddings", "pooler"}
    assert all(torch.equal(big[name], small[name]) for name in still)
    for place, layer in enumerate([0, 3]):
        name = "encoder.layer.{}.attention.self.query.weight"
        assert not torch.equal(big[name.format(layer)], small[name.format(place)])


def test_embeddings_are_trained_on_request(base: str, texts: Path, tmp_path: Path) -> None:
    recipe = Distillation(steps=2, learning_rate=1e-2, max_length=16, bf16=False, train_embeddings=True)
    distil(base, [texts], tmp_path / "m", layers=1, recipe=recipe)
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(weights(base)[name], weights(tmp_path / "m")[name])


class _Killed(BaseException):
    pass


class _KillAt(TrainerCallback):  # type: ignore[misc]
    step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise _Killed


@pytest.mark.parametrize(("killed", "by_time", "first"), [(26, False, 24), (26, True, 25)])
def test_a_killed_run_resumes_and_ends_where_it_would_have_ended(
    killed: int,
    by_time: bool,
    first: int,
    base: str,
    texts: Path,
    distilled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are 20 batches in an epoch, so the run is killed in its second."""
    steps: list[int] = []

    class Watched(DistillationTrainer):
        def __init__(self, *settings: Any, **more: Any) -> None:
            super().__init__(*settings, **more, callbacks=[_KillAt()])

        def training_step(self, *arguments: Any) -> Any:
            steps.append(self.state.global_step)
            return super().training_step(*arguments)

    output, work = tmp_path / "2L", tmp_path / "2L.training"
    monkeypatch.setattr(module, "DistillationTrainer", Watched)
    monkeypatch.setattr(module, "_SAVED_EVERY", 0.0 if by_time else 1e9)
    monkeypatch.setattr(_KillAt, "step", killed)
    with pytest.raises(_Killed):
        distil(base, [texts], output, layers=2, recipe=RECIPE)
    assert not output.exists()
    (work / f"checkpoint-{killed}").mkdir(exist_ok=True)  # what a kill leaves in the middle of writing one
    steps.clear()
    monkeypatch.setattr(_KillAt, "step", 0)
    record = distil(base, [texts], output, layers=2, recipe=RECIPE)
    assert steps[0] == first, "it goes on from the last whole checkpoint"
    assert not work.exists()
    resumed, straight = weights(output), weights(distilled)
    assert all(torch.allclose(resumed[name], straight[name], atol=1e-6) for name in straight)
    undisturbed = json.loads((distilled / RECORD).read_text("utf-8"))["validation"]["history"]
    assert [entry["step"] for entry in record["validation"]["history"]] == [entry["step"] for entry in undisturbed]


def test_a_run_resumes_where_bfloat16_is_measured_differently(
    base: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Distillation(steps=4, max_length=16)
    measured = iter([False, True])
    monkeypatch.setattr(module, "bf16_pays", lambda: next(measured))
    monkeypatch.setattr(_KillAt, "step", 3)

    class Watched(DistillationTrainer):
        def __init__(self, *settings: Any, **more: Any) -> None:
            super().__init__(*settings, **more, callbacks=[_KillAt()])

    monkeypatch.setattr(module, "DistillationTrainer", Watched)
    with pytest.raises(_Killed):
        distil(base, [texts], tmp_path / "m", layers=1, recipe=recipe)
    monkeypatch.setattr(_KillAt, "step", 0)
    record = distil(base, [texts], tmp_path / "m", layers=1, recipe=recipe)
    assert (record["steps"], record["bf16"]) == (4, True)


def test_in_bfloat16_both_models_compute_in_it(base: str, texts: Path, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    linear = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, values: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = linear(self, values)
        if torch.is_autocast_enabled("cpu"):
            seen.append(output.dtype)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", watched)
        distil(base, [texts], tmp_path / "m", layers=1, recipe=Distillation(steps=1, max_length=16, bf16=True))
    per_layer, pooler = 6, 1
    assert seen == [torch.bfloat16] * ((1 + 4) * per_layer + 2 * pooler)
    assert {weight.dtype for weight in weights(tmp_path / "m").values()} == {torch.float32}


def test_whether_bfloat16_pays_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(hardware.bf16_pays(), bool)
    assert all(seconds > 0 for seconds in hardware._product_times(torch.float32, torch.bfloat16).values())
    for gain, pays in ((1.29, False), (1.31, True)):
        monkeypatch.setattr(
            hardware, "_product_times", lambda *_, gain=gain: {torch.float32: gain, torch.bfloat16: 1.0}
        )
        assert hardware.bf16_pays() is pays


SIZES: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 20}
BERT_SIZES: dict[str, Any] = SIZES | {"num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "distilbert": (DistilBertModel, DistilBertConfig(**SIZES, n_layers=5, n_heads=2, dim=16, hidden_dim=24)),
    "mpnet": (MPNetModel, MPNetConfig(**BERT_SIZES, hidden_size=16)),
    "roberta": (RobertaModel, RobertaConfig(**BERT_SIZES, hidden_size=16)),
    "electra": (ElectraModel, ElectraConfig(**BERT_SIZES, hidden_size=16, embedding_size=8)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_other_families_are_found(family: str) -> None:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    teacher = kind(config).eval()
    student = make_student(teacher, [0, 2, 4], "x").eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    captured: list[torch.Tensor] = []

    def skip(module: Any, inputs: Any, output: Any) -> Any:
        """Replace a layer by the identity."""
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    layers = (teacher.transformer if family == "distilbert" else teacher.encoder).layer
    for index in (1, 3):
        layers[index].register_forward_hook(skip)
    with torch.inference_mode():
        ours, theirs = student(**batch).last_hidden_state, teacher(**batch).last_hidden_state
        assert torch.allclose(ours, theirs, atol=1e-5), "the teacher without its layers 1 and 3"
        for module_ in projections(student, "x"):
            module_.register_forward_hook(lambda module, inputs, output: captured.append(output))
        student(**batch)
    assert [tuple(vectors.shape) for vectors in captured] == [(1, 4, 16)] * 3


def test_families_that_cannot_be_cut_are_refused() -> None:
    albert = AlbertModel(AlbertConfig(**BERT_SIZES, hidden_size=16, embedding_size=8, num_hidden_groups=1))
    with pytest.raises(InputError, match="some/albert: cannot take single layers out of a AlbertModel"):
        make_student(albert, [0, 4], "some/albert")
    with pytest.raises(InputError, match="some/albert: relations need separate queries"):
        projections(albert, "some/albert")


def test_losses_are_those_of_real_tokens_alone() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ours, theirs = student.double().numpy(), teacher.double().numpy()
    real = [ours[0, :2], ours[1]], [theirs[0, :2], theirs[1]]
    squares = np.concatenate([(a - b) ** 2 for a, b in zip(*real, strict=True)])
    assert float(hidden_state_error(student, teacher, mask, 2.0)) == pytest.approx(squares.mean() / 2, rel=1e-5)
    means = [(a.mean(0), b.mean(0)) for a, b in zip(*real, strict=True)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in means]
    assert mean_vector_cosine(student, teacher, mask).tolist() == pytest.approx(cosines, rel=1e-5)


def relation_reference(student: Any, teacher: Any, real: list[int], heads: int) -> float:
    """Compute MiniLMv2's loss head by head and token by token, in float64."""
    found = []
    for row, count in enumerate(real):
        for head in range(heads):
            for token in range(count):
                distributions = []
                for vectors in (teacher, student):
                    size = vectors.shape[-1] // heads
                    part = vectors[row, :count, head * size : (head + 1) * size]
                    scores = np.exp(part @ part[token] / np.sqrt(size))
                    distributions.append(scores / scores.sum())
                found.append((row, token, np.sum(distributions[0] * np.log(distributions[0] / distributions[1]))))
    return float(np.mean([value for _, _, value in found]))


def test_the_relation_loss_is_the_papers() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    expected = relation_reference(student.double().numpy(), teacher.double().numpy(), [3, 4], heads=3)
    assert float(relation_divergence(student, teacher, mask, 3)) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1
    assert float(relation_divergence(teacher, teacher, mask, 3)) == pytest.approx(0, abs=1e-7)


def test_the_relations_of_the_last_layers_are_learned(
    base: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss takes queries, keys and values of the student's and the teacher's last layer."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
        assert heads == 2, "of 16 dimensions"
        assert student.requires_grad
        assert not teacher.requires_grad
        seen.append((student.detach(), teacher))
        return relation_divergence(student, teacher, mask, heads)

    monkeypatch.setattr(module, "relation_divergence", watched)
    taken: list[dict[str, torch.Tensor]] = []

    class Watched(DistillationTrainer):
        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
            taken.append(dict(inputs))
            return super().training_step(model, inputs, *rest)

    monkeypatch.setattr(module, "DistillationTrainer", Watched)
    recipe = Distillation(steps=2, batch_size=16, max_length=16, bf16=False, relations=True)
    record = distil(base, [texts], tmp_path / "m", layers=2, recipe=recipe)
    assert record["recipe"]["relations"] is True
    assert len(seen) == 2 * 3
    teacher = load_encoder(base)[1]
    for place, model in enumerate((make_student(teacher, [0, 3], base).eval(), teacher)):
        with torch.inference_mode():
            entering = model(**taken[0], output_hidden_states=True).hidden_states[-2]
            attention = model.encoder.layer[-1].attention.self
            wanted = [projection(entering) for projection in (attention.query, attention.key, attention.value)]
        for pair, right in zip(seen[:3], wanted, strict=True):
            assert torch.allclose(pair[place], right, atol=1e-5), "before the first step, and without dropout"


def rows(tokenized: Tokenized) -> list[NDArray[np.int32]]:
    return [tokenized[row] for row in range(len(tokenized))]


def test_texts_are_read_from_files_of_any_format(base: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a good film\n\n   \nthe cat sat\na good film\n")
    (tmp_path / "b.jsonl").write_text('{"t": "the cat sat"}\n{"t": "a bad dog runs"}\n')
    tokenizer, _ = load_encoder(base)
    found = Tokenized.read(tokenizer, [tmp_path / "a.txt"], 16)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows(found)] == ["a good film", "the cat sat"]
    both = Tokenized.read(tokenizer, [tmp_path / "b.jsonl"], 5, Reading(columns=("t",)))
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows(both)] == ["the cat sat", "a bad dog"]
    assert found[0].dtype == np.int32
    train, held = both.split(0)
    assert (len(train), len(held)) == (1, 1)
    assert {tuple(train[0]), tuple(held[0])} == {tuple(row) for row in rows(both)}


def test_batches_hold_texts_of_like_length_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=1003)
    sampler = module._BatchesOfLikeLength(lengths, 16, seed=3)
    rows = list(sampler)
    assert sorted(rows) == list(range(1003))
    longest = [max(lengths[rows[start : start + 16]]) for start in range(0, 992, 16)]
    assert sum(lengths[rows[:992]]) > 0.9 * 16 * sum(longest), "at random about half would be padding"
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3, "neither the short nor the long ones first"
    assert list(sampler) == rows
    sampler.set_epoch(1)
    assert list(sampler) != rows


def test_what_cannot_be_is_refused(base: str, texts: Path, distilled: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="exists; choose another"):
        distil(base, [texts], distilled, layers=2, recipe=RECIPE)
    for layers in (0, 4):
        with pytest.raises(InvalidOption, match=f"`layers`: found {layers}, expected 1 to 3, fewer than the 4 layers"):
            distil(base, [texts], output, layers=layers, recipe=RECIPE)
    with pytest.raises(InputError, match="`max_length`: found 65, expected at most 64"):
        distil(base, [texts], output, layers=2, recipe=Distillation(max_length=65))
    with pytest.raises(InputError, match="^no/such: no such folder"):
        distil("no/such", [texts], output, layers=2, recipe=RECIPE)
    (tmp_path / "empty.txt").write_text("\na film\n\na film\n")
    with pytest.raises(InputError, match=r"empty.txt: found 1 texts, expected at least 2"):
        distil(base, [tmp_path / "empty.txt"], output, layers=2, recipe=RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"], "a corrected command finds nothing in its way"


def test_another_runs_work_is_not_continued(base: str, texts: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    (work / "checkpoint-4").mkdir(parents=True)
    (work / "run.json").write_text(json.dumps({"base": base, "layers": 3}))
    with pytest.raises(CascadeError, match=r"unfinished run with another layers \(found 3, expected 2\)"):
        distil(base, [texts], tmp_path / "out", layers=2, recipe=RECIPE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"steps": 0},
        {"learning_rate": float("nan")},
        {"batch_size": 0},
        {"max_length": 2},
        {"warmup_ratio": 2},
        {"weight_decay": -0.1},
        {"seed": -1},
    ],
)
def test_an_invalid_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="found .*, expected a number from") as refused:
        Distillation(**wrong)
    assert refused.value.field == next(iter(wrong))


def test_the_command_makes_an_encoder_to_train(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sentences(2, 40)
    (tmp_path / "texts.csv").write_text("\n".join(["say", *rows]))
    command = f"distil --base {base} --layers 2 --texts texts.csv --text-column say --max-length 16 --no-bf16"
    assert main([*command.split(), "--epochs", "2", "--batch-size", "8", "--output", "encoders/2L"]) == 0
    printed = capsys.readouterr()
    assert f"encoders/2L: 2 layers, from layers 1, 4 of {base}; 39 texts, 10 steps" in printed.out
    assert "next: cascade-rt train --base encoders/2L " in printed.out
    assert "training 2L: step 10 of 10" in printed.err
    assert "cosine" in printed.err
    (tmp_path / "labelled.csv").write_text("\n".join(["text,label", *(f"{row},{len(row) % 2}" for row in rows)]))
    command = "train --base encoders/2L --train-file labelled.csv --epochs 1 --max-length 16 --output members/2L"
    assert main(command.split()) == 0
    command = f"distil --base {base} --layers 1 --texts texts.csv --text-column say --max-length 16 --steps 1 --json"
    capsys.readouterr()
    assert main([*command.split(), "--output", "encoders/1L"]) == 0
    assert json.loads(capsys.readouterr().out)["picked"] == [3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--base {base} --layers 9 --texts {texts} --output out", "--layers: found 9, expected 1 to 3"),
        ("--base {base} --layers 2 --texts {texts} --output out --steps 0", "--steps: found 0"),
        ("--base {base} --layers 2 --texts none.txt --output out --max-length 16", "none.txt: no such file"),
        ("--base {base} --texts {texts} --output out", "--layers"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: str, says: str, base: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distil", *arguments.format(base=base, texts=texts).split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
