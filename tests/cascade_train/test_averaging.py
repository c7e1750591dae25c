"""Deep averaging networks: what they compute, how they learn, what resumes, what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascade_train import RECORD, VALIDATION, finetune
from cascade_train import averaging_training as module
from cascade_train.averaging import (
    AveragingConfig,
    AveragingForSequenceClassification,
    Network,
    ngram_rows,
    token_hashes,
)
from cascade_train.averaging_training import AveragingRecipe, token_vectors, train_averaging
from cascade_train.finetune import Objective, logits_of
from cascade_train.tasks import Examples, TaskData
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError, InvalidOption

from ..cascade_export.families import FAMILIES
from ..conftest import WORDS, make_member

NETWORK = Network(buckets=64, dimension=8, hidden=8)
RECIPE = AveragingRecipe(epochs=8, learning_rate=2e-2, batch_size=8, max_length=16)


def task(pair: bool = False) -> TaskData:
    """Tell texts with "good" from texts with "bad"; of pairs, those that share their first word from others."""
    singles = [f"{WORDS[index % 20]} {'good' if index % 2 else 'bad'} {WORDS[(index * 7) % 30]}" for index in range(80)]
    pairs = [(f"{WORDS[index % 30]} cat", f"{WORDS[(index + index % 2) % 30]} dog") for index in range(80)]
    texts, labels = (pairs if pair else singles), [index % 2 for index in range(80)]
    parts = (Examples(texts[:64], labels[:64]), Examples(texts[64:], labels[64:]))
    return TaskData("toy", ("even", "odd"), pair, "accuracy", *parts)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_member(tmp_path_factory.mktemp("base") / "2L", layers=2))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "DAN"
    train_averaging(task(), output, tokenizer=base, unigrams=base, network=NETWORK, recipe=RECIPE)
    return output


def network(pair: bool = False, **size: int) -> AveragingForSequenceClassification:
    torch.manual_seed(0)
    config = AveragingConfig(
        vocab_size=50,
        network={"buckets": 40, "dimension": 6, "hidden": 5, **size},
        pair=pair,
        sep_token_id=3,
        num_labels=3,
    )
    model = AveragingForSequenceClassification(config)
    torch.nn.init.normal_(model.table.weight)
    model.seen.bernoulli_(0.7)
    model.eval()
    return model


def grams(ids: list[int], config: AveragingConfig) -> list[tuple[int, ...]]:
    size = config.size
    return [tuple(ids[at : at + length]) for length in range(1, size.ngrams + 1) for at in range(len(ids) - length + 1)]


def row(gram: tuple[int, ...], config: AveragingConfig) -> int:
    if len(gram) == 1:
        return gram[0]
    factors = (1, 1_000_003, 998_244_353)
    return config.vocab_size + sum(factor * id for factor, id in zip(factors, gram, strict=False)) % config.size.buckets


def loops(model: AveragingForSequenceClassification, ids: list[int]) -> Any:
    """The logits of one text, n-gram by n-gram."""
    config, table = model.config, model.table.weight.detach().numpy().astype(np.float64)

    def mean(some: list[tuple[int, ...]]) -> Any:
        return sum((table[row(gram, config)] for gram in some), np.zeros(table.shape[1])) / max(1, len(some)) ** 0.5

    vector = mean(grams(ids, config))
    if config.pair:
        border = ids.index(3) + 1 if 3 in ids else len(ids)
        found = [
            (gram, at >= border)
            for n in range(1, config.size.ngrams + 1)
            for at, gram in enumerate(zip(*(ids[k:] for k in range(n)), strict=False))
        ]
        first, second = ([gram for gram, after in found if after == side] for side in (False, True))
        rows = [{row(gram, config) for gram in part} for part in (first, second)]
        shared = [g for g in first if row(g, config) in rows[1]] + [g for g in second if row(g, config) in rows[0]]
        one, other, both = map(mean, (first, second, shared))
        vector = np.concatenate([one, other, abs(one - other), one * other, both])
    weights = [
        weight.detach().numpy().astype(np.float64)
        for weight in (*model.hidden.parameters(), *model.classifier.parameters())
    ]
    share = np.mean([bool(model.seen[row(gram, config)]) for gram in grams(ids, config)])
    return share * (np.maximum(weights[0] @ vector + weights[1], 0) @ weights[2].T + weights[3])


@given(
    texts=st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=9), min_size=1, max_size=5),
    ngrams=st.integers(1, 3),
    pair=st.booleans(),
)
def test_logits_are_those_of_plain_loops(texts: list[list[int]], ngrams: int, pair: bool) -> None:
    model = network(pair, ngrams=ngrams)
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    with torch.inference_mode():
        found = model(ids, mask).logits.numpy()
    np.testing.assert_allclose(found, [loops(model, text) for text in texts], atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 30_522, 262_144])
def test_hashes_are_exact_in_float32(tokens: int) -> None:
    size = Network(ngrams=3, buckets=2**22)
    ids = torch.arange(tokens)
    largest = (tokens - 1) + sum(int(token_hashes(ids, before, size).max()) for before in (1, 2))
    assert largest + tokens < 2**24


def test_it_learns_and_is_a_hugging_face_folder(trained: Path) -> None:
    record = json.loads((trained / RECORD).read_text())
    assert record["validation"]["best"] == 1.0
    assert record["layers"] == 0
    assert record["network"]["buckets"] == 64
    assert (trained / VALIDATION).is_file()
    assert (trained / "model.safetensors").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert isinstance(model, AveragingForSequenceClassification)
    assert model.config.id2label == {0: "even", 1: "odd"}
    assert AutoTokenizer.from_pretrained(trained).sep_token == "[SEP]"


def test_it_knows_the_ngrams_of_its_training_texts(trained: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    seen = {
        row(gram, model.config)
        for text in task().train.texts
        for gram in grams(tokenizer(text).input_ids, model.config)
    }
    assert set(model.seen.nonzero().flatten().tolist()) == seen


def test_a_pair_is_what_its_texts_share(base: str, tmp_path: Path) -> None:
    record = train_averaging(task(pair=True), tmp_path / "DAN", tokenizer=base, network=NETWORK, recipe=RECIPE)
    assert record["validation"]["best"] >= 0.9, "single texts cannot tell"


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, output: Path, settings: dict[str, Any]) -> None:
    """Train until the checkpoint of a step."""

    class Kill(TrainerCallback):  # type: ignore[misc]  # the library has no types
        def on_save(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    plain = finetune.member_trainer

    def killed(*arguments: Any, **others: Any) -> Any:
        trainer = plain(*arguments, **others)
        trainer.add_callback(Kill())
        return trainer

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(module, "member_trainer", killed)
        train_averaging(task(), output, **settings)
    assert not output.exists()


def test_the_same_seed_gives_the_same_weights_and_a_killed_run_resumes(
    base: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"tokenizer": base, "unigrams": base, "network": NETWORK, "recipe": RECIPE}
    killed_at(24, monkeypatch, tmp_path / "DAN", settings)
    monkeypatch.setattr(module, "token_vectors", None)  # kept with the work
    train_averaging(task(), tmp_path / "DAN", **settings)
    ours, theirs = (
        AutoModelForSequenceClassification.from_pretrained(at).state_dict() for at in (tmp_path / "DAN", trained)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_ends_when_validation_no_longer_improves(base: str, tmp_path: Path) -> None:
    recipe = AveragingRecipe(epochs=50, learning_rate=2e-2, batch_size=8, max_length=16, patience=2)
    record = train_averaging(task(), tmp_path / "DAN", tokenizer=base, network=NETWORK, recipe=recipe)
    assert record["steps"] < 50 * 8


def test_a_resumed_run_has_waited_for_an_improvement_as_long_as_the_killed_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = AveragingRecipe(epochs=50, learning_rate=1e-12, batch_size=8, max_length=16, patience=3)
    settings: dict[str, Any] = {"tokenizer": base, "network": NETWORK, "recipe": recipe}
    killed_at(24, monkeypatch, tmp_path / "DAN", settings)
    assert train_averaging(task(), tmp_path / "DAN", **settings)["steps"] == 32, "one best validation, three others"


def test_a_teacher_is_learnt(base: str, tmp_path: Path) -> None:
    data = task()
    teacher = np.where(np.array(data.train.labels)[:, None] == [0, 1], -4.0, 4.0).astype(np.float32)  # all labels wrong
    objective = Objective(teacher=teacher, distill_weight=1.0)
    train_averaging(data, tmp_path / "DAN", tokenizer=base, network=NETWORK, recipe=RECIPE, objective=objective)
    answers = logits_of(str(tmp_path / "DAN"), data, data.train, 16).argmax(1)
    assert np.mean(answers == data.train.labels) < 0.6, "the checkpoint is chosen by labels, and learns from none"


def test_a_step_changes_only_the_rows_of_its_texts() -> None:
    model = network().train()
    before = model.table.weight.detach().clone()
    optimizer = module._Optimizer(model, RECIPE)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    rows, _ = ngram_rows(ids, torch.ones_like(ids), model.config)
    changed = (model.table.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(rows.flatten().tolist())
    assert changed


def test_token_vectors_are_principal_components(base: str) -> None:
    vectors = token_vectors(base, base, ("a", "b"), 8)
    correlations = np.corrcoef(vectors.numpy().T)
    np.testing.assert_allclose(correlations, np.eye(8), atol=1e-3)
    assert float(vectors.std()) == pytest.approx(2.0)
    assert not token_vectors(base, base, ("a", "b"), 40)[:, 32:].any(), "an encoder of 32 dimensions"
    variances = vectors.var(0).tolist()
    assert variances == sorted(variances, reverse=True)


def test_settings_out_of_range_are_refused(trained: Path) -> None:
    with pytest.raises(InvalidOption, match="ngrams"):
        Network(ngrams=4)
    with pytest.raises(InvalidOption, match="patience"):
        AveragingRecipe(patience=0)
    with pytest.raises(InvalidOption, match="at most 130,"):
        train_averaging(task(), trained.parent / "other", tokenizer=str(trained), network=Network(dimension=4096))
    assert [path.name for path in trained.parent.iterdir()] == ["DAN"]


def test_the_command(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "\n".join(f"{text},{label}" for text, label in zip(task().train.texts, task().train.labels, strict=True))
    (tmp_path / "data.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "more.txt").write_text("a good cat\nthe bad dog\n")
    sizes = "--buckets 64 --dimension 8 --hidden 8 --epochs 2 --max-length 16"
    main(f"train-dan --tokenizer {base} --train-file data.csv {sizes} --output teacher".split())
    assert "best validation accuracy" in capsys.readouterr().out
    command = (
        f"train-dan --teacher teacher --train-file data.csv {sizes} --unlabelled more.txt --augment 1 --unigrams {base}"
    )
    assert main(f"{command} --output DAN".split()) == 0
    assert "unlabelled" in capsys.readouterr().out
    record = json.loads((tmp_path / "DAN" / RECORD).read_text())
    assert record["objective"]["distillation"] == {"temperature": 1.0, "weight": 0.5}
    for given_too, message in (("--augment 1", "--teacher"), ("--unlabelled more.txt", "--teacher")):
        assert main(f"train-dan --tokenizer {base} --train-file data.csv {given_too} --output other".split()) == 2
        assert message in capsys.readouterr().err
    assert main(["train-dan", "--train-file", "data.csv", "--output", "other"]) == 2
    assert "expected --tokenizer DIR" in capsys.readouterr().err


def test_pairs_need_a_separator(base: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="sep_token"):
        train_averaging(
            task(pair=True), tmp_path / "DAN", tokenizer=str(tmp_path / "tokenizer"), network=NETWORK, recipe=RECIPE
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--ngrams 0", "--ngrams: found 0, expected a number from 1 to 3"),
        ("--buckets 0", "--buckets: found 0, expected a number from 1 to"),
        ("--dimension 4096 --buckets 4000000", "--buckets: found 4000000, expected at most 130,"),
        ("--hidden 100000", "--hidden: found 100000"),
        ("--dropout 1", "--dropout: found 1"),
        ("--epochs 0", "--epochs: found 0"),
        ("--max-length 100", "--max-length: found 100, expected at most 64"),
        ("--tokenizer nowhere", "nowhere: no such folder"),
        ("--unigrams DAN", "--unigrams: found '{DAN}', expected an encoder, with layers"),
        ("--unigrams FAMILY", "lacks 79 of the 109 tokens of"),
        ("--teacher DAN", "--unigrams"),
        ("--teacher OTHER --unigrams BASE", "--teacher: found '{OTHER}', expected a member with the labels"),
        ("--unlabelled nowhere.txt --teacher BASE", "nowhere.txt"),
        ("--output there", "there exists; choose another output folder"),
    ],
)
def test_what_cannot_work_is_refused_at_once_and_leaves_nothing(
    options: str, says: str, base: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["yes", "no"] if "DAN" not in options else ["even", "odd"]
    rows = [f"{text},{labels[label]}" for text, label in zip(task().train.texts, task().train.labels, strict=True)]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "there").mkdir()
    folders = {"DAN": str(trained), "OTHER": base, "BASE": base}
    if "FAMILY" in options:
        folders["FAMILY"] = str(FAMILIES["xlm-roberta"](tmp_path.parent / f"{tmp_path.name}-family"))
    for name, folder in folders.items():
        options, says = options.replace(name, folder), says.replace(f"{{{name}}}", folder)
    usual = {"--tokenizer": base, "--train-file": "data.csv", "--max-length": "16", "--output": "out"}
    given = [*options.split(), *(word for pair in usual.items() if pair[0] not in options for word in pair)]
    assert main(["train-dan", *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "there"]


@pytest.mark.parametrize(("command", "option"), [("train", "--base"), ("build", "--big")])
def test_other_commands_refuse_it_as_an_encoder(
    command: str, option: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, option, str(trained), "--task", "smart-home", "--output", "out"]) == 2
    assert "expected an encoder" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_start_does_not_take_the_vectors_of_the_unfinished_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"tokenizer": base, "unigrams": base, "recipe": RECIPE}
    monkeypatch.setattr(module, "member_trainer", kill)
    with contextlib.suppress(KeyboardInterrupt):
        train_averaging(task(), tmp_path / "DAN", network=NETWORK, **settings)
    monkeypatch.undo()
    with pytest.raises(CascadeError, match="holds an unfinished run with another network"):
        train_averaging(task(), tmp_path / "DAN", network=Network(buckets=64, dimension=6, hidden=8), **settings)


def test_labels_without_validation_texts_and_few_texts_are_fine(base: str, tmp_path: Path) -> None:
    few = TaskData(
        "few", ("a", "b", "c"), False, "f1", Examples(["a cat", "bad", "good"], [0, 1, 2]), Examples(["a"], [0])
    )
    record = train_averaging(few, tmp_path / "DAN", tokenizer=base, network=NETWORK, recipe=RECIPE)
    assert record["validation"]["best"] is not None
