"""Members of another origin: the same words under other ids give the same logits; what cannot be aligned is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cascade_export.check import Check
from cascade_export.checkpoint import tokenizer_differences
from cascade_export.export import export_bundle
from cascade_export.torch_checkpoint import align_checkpoint, open_torch
from cascade_export.verify import torch_probabilities
from cascade_train import RECORD
from cascade_train.alignment import Aligned, align, check_alignment, usable_positions
from cascade_train.difficulty import Splits, label_difficulty
from cascade_train.finetune import Recipe, finetune
from cascade_train.inference import text_logits
from cascade_train.tasks import Examples, TaskData
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    MPNetTokenizerFast,
    PreTrainedTokenizerFast,
    pipeline,
)

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import CascadeError, InputError
from cascade_rt.types import Text

from ..conftest import WORDS
from .families import FAMILIES

TASK = SingleLabel()

LABELS = ("bad", "good")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = list(dict.fromkeys([*WORDS, *".,!?'", *LETTERS, *(f"##{letter}" for letter in LETTERS)]))
BERT = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
MPNET = ["<s>", "<pad>", "</s>", "<unk>", *BERT, "<mask>"]
"""As in the real models: BERT's vocabulary, special tokens included, four ids higher."""
LENGTH = 24
TEXTS = ["a great film", "so sad", "the cat sat on the mat " * 9, "", "Not very witty, 🙂 is it?", "[unused0] no"]
PAIRS: list[Text] = [(one, other) for one in TEXTS[:3] for other in TEXTS[:2]]


def bert_tokenizer(root: Path, pieces: Sequence[str] = BERT) -> PreTrainedTokenizerFast:
    (root / "bert.txt").write_text("\n".join(pieces))
    return BertTokenizerFast(str(root / "bert.txt"), model_max_length=LENGTH)


def mpnet_tokenizer(root: Path, pieces: Sequence[str] = MPNET) -> PreTrainedTokenizerFast:
    (root / "mpnet.txt").write_text("\n".join(pieces))
    return MPNetTokenizerFast(str(root / "mpnet.txt"), model_max_length=LENGTH)


def classifier(kind: str, tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    reserved = 0 if kind == "bert" else tokenizer.pad_token_id + 1
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=LENGTH + reserved,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.3,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        **more,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def saved(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def renumbered(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer, but the token i has the id `ids[i]`."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: ids[index] for token, index in model["vocab"].items()}
    else:
        order = np.argsort(ids)
        model["vocab"] = [model["vocab"][index] for index in order]
        model["unk_id"] = ids[model["unk_id"]]
    for token in parts["added_tokens"]:
        token["id"] = ids[token["id"]]
    template = parts["post_processor"]
    for name in ("sep", "cls"):
        if name in template:
            template[name][1] = ids[template[name][1]]
    for token in template.get("special_tokens", {}).values():
        token["ids"] = [ids[index] for index in token["ids"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alignment")


@pytest.fixture(scope="module")
def small(root: Path) -> Path:
    """The first member: BERT with one layer."""
    tokenizer = bert_tokenizer(root)
    return saved(root / "small", classifier("bert", tokenizer, layers=1, seed=1), tokenizer)


@pytest.fixture(scope="module")
def big(root: Path) -> Path:
    """The second: MPNet with two."""
    tokenizer = mpnet_tokenizer(root)
    return saved(root / "big", classifier("mpnet", tokenizer, seed=2), tokenizer)


@pytest.fixture(scope="module")
def bundle(root: Path, small: Path, big: Path) -> Path:
    (root / "check.txt").write_text("\n".join(text for text in TEXTS if text))
    export_bundle([str(big), str(small)], root / "bundle", check=Check(root / "check.txt"))
    return root / "bundle"


def test_an_aligned_member_answers_in_a_bundle_as_the_original_under_its_own_tokenizer(bundle: Path, big: Path) -> None:
    runtime = CascadeRuntime(bundle)
    original = open_torch(str(big))
    expected = text_logits(original.tokenizer, original.model, TEXTS, LENGTH)
    assert np.ptp(expected[:, 0] - expected[:, 1]) > 0.1, "the texts get different answers"
    np.testing.assert_allclose(runtime.member_logits(TEXTS)[0][1], expected, atol=1e-4)
    for text, logits in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(runtime.member_logits([text])[0][1, 0], logits, atol=1e-4)


def test_the_bundle_has_the_first_members_tokenizer_and_says_what_was_aligned(bundle: Path, small: Path) -> None:
    first, second = CascadeRuntime(bundle).bundle.members
    assert "alignment" not in first.other, "its tokenizer is the bundle's"
    found = second.other["alignment"]
    assert found.pop("max_logit_difference") <= 1e-4
    assert found == {"tokenizer_of": "small", "tokens": len(BERT), "moved": len(BERT), "texts": 5, "same_tokens": 5}
    assert second.other["check"]["labels_agree"] == 1
    ours = json.loads((bundle / "tokenizer.json").read_text("utf-8"))
    assert ours["model"] == json.loads((small / "tokenizer.json").read_text("utf-8"))["model"]


def test_special_tokens_correspond_by_role_and_words_by_spelling(small: Path, big: Path) -> None:
    original, target = open_torch(str(big)), AutoTokenizer.from_pretrained(small)
    aligned = align(original.model, original.tokenizer, target)
    before, after = (model.get_input_embeddings().weight for model in (original.model, aligned.model))
    for token, counterpart in (("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[PAD]", "<pad>"), ("[MASK]", "<mask>")):
        assert MPNET.index(token) != MPNET.index(counterpart), "both vocabularies have this spelling"
        assert torch.equal(after[BERT.index(token)], before[MPNET.index(counterpart)])
    for token in ("[UNK]", "film", "##s"):
        assert torch.equal(after[BERT.index(token)], before[MPNET.index(token)])
    assert aligned.model.config.pad_token_id == BERT.index("[PAD]")
    assert len(after) == aligned.model.config.vocab_size == len(BERT)
    assert original.model.config.vocab_size == len(MPNET), "the original is as it was"
    first = open_torch(str(small))
    checkpoint = align_checkpoint(original, first, TEXTS)
    assert tokenizer_differences(first, original)
    assert tokenizer_differences(first, checkpoint) == []


@settings(max_examples=25)
@given(ids=st.permutations(range(len(BERT))), kind=st.sampled_from(["bert", "roberta"]))
def test_any_numbering_of_the_words_gives_the_same_logits(root: Path, ids: list[int], kind: str) -> None:
    own = bert_tokenizer(root)
    target = renumbered(own, ids)
    more = {"type_vocab_size": 2} if kind == "roberta" else {}
    model = classifier(kind, own, **more)
    aligned = align(model, own, target)
    assert aligned.moved == sum(index != new for index, new in enumerate(ids))
    for texts in (TEXTS, PAIRS):
        before = text_logits(own, model, texts, LENGTH)
        assert np.ptp(before, axis=0).max() > 0.05
        np.testing.assert_allclose(text_logits(target, aligned.model, texts, LENGTH), before, atol=1e-4)
        found = check_alignment(model, own, aligned, target, texts, LENGTH)
        assert found.texts == found.same_tokens == len(texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_aligned_and_saved(family: str, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(folder := FAMILIES[family](tmp_path / "member"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = list(np.random.default_rng(0).permutation(len(own)))
    if family == "mpnet":  # its padding id is fixed
        at = ids.index(own.pad_token_id)
        ids[at], ids[own.pad_token_id] = ids[own.pad_token_id], own.pad_token_id
    target = renumbered(own, list(map(int, ids)))
    aligned = align(model, own, target)
    saved(tmp_path / "aligned", aligned.model, target)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "aligned").eval()
    assert usable_positions(reloaded) == usable_positions(model)
    for texts in (TEXTS, PAIRS):
        found = check_alignment(model, own, replace(aligned, model=reloaded), target, texts, LENGTH)
        assert found.same_tokens == len(texts)


def test_positions_move_with_the_padding_id_and_a_model_without_token_types_takes_them(root: Path) -> None:
    own, target = mpnet_tokenizer(root), bert_tokenizer(root)
    model = classifier("roberta", own, type_vocab_size=1)
    aligned = align(model, own, target)
    before, after = (each.roberta.embeddings.position_embeddings for each in (model, aligned.model))
    assert (before.padding_idx, after.padding_idx) == (1, 0)
    assert torch.equal(before.weight[1:], after.weight)
    assert usable_positions(aligned.model) == LENGTH
    found = check_alignment(model, own, aligned, target, TEXTS, LENGTH)
    assert (found.texts, found.same_tokens) == (len(TEXTS), len(TEXTS))
    assert set(target(*PAIRS[0])["token_type_ids"]) == {0, 1}
    typed = text_logits(target, aligned.model, PAIRS, LENGTH)
    untyped = [torch.tensor([target(*pair)["input_ids"]]) for pair in PAIRS[:2]]
    with torch.inference_mode():
        plain = torch.cat([aligned.model(input_ids=ids).logits for ids in untyped]).numpy()
    np.testing.assert_allclose(typed[:2], plain, atol=1e-4)


@pytest.mark.parametrize("token", ["[UNK]", "the", "##s", "[CLS]"])
def test_a_token_at_the_id_that_mpnet_always_takes_for_padding_is_refused(token: str, root: Path, big: Path) -> None:
    pieces = ["[PAD]", token, *(piece for piece in BERT[1:] if piece != token)]
    target = bert_tokenizer(root, pieces)
    original = open_torch(str(big))
    with pytest.raises(InputError, match=r"MPNetForSequenceClassification always takes the id 1 for padding") as error:
        align(original.model, original.tokenizer, target)
    assert repr(token) in str(error.value)


def test_words_that_a_member_lacks_are_counted_with_five_examples(root: Path, big: Path, tmp_path: Path) -> None:
    animals = ["zebra", "yak", "wolf", "vole", "tapir", "stoat", "skunk"]
    tokenizer = bert_tokenizer(root, [*BERT, *animals])
    other = saved(tmp_path / "animals", classifier("bert", tokenizer, layers=1), tokenizer)
    says = (
        rf"big: lacks 7 of the {len(BERT) + 7} tokens of .*animals "
        r"\('zebra', 'yak', 'wolf', 'vole', 'tapir', \.\.\.\), expected the same words under any ids; "
        "use members of one family"
    )
    with pytest.raises(InputError, match=says):
        export_bundle([str(other), str(big)], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_that_is_not_the_same_is_refused(small: Path, big: Path) -> None:
    original, target = open_torch(str(big)), AutoTokenizer.from_pretrained(small)
    aligned = align(original.model, original.tokenizer, target)
    with torch.no_grad():
        aligned.model.get_input_embeddings().weight[BERT.index("sad")] *= -1
    with pytest.raises(CascadeError, match=r"logits differ by .* \(allowed 1e-04\) for check text 1; .*cannot be"):
        check_alignment(original.model, original.tokenizer, aligned, target, TEXTS, LENGTH)
    found = check_alignment(original.model, original.tokenizer, aligned, target, [TEXTS[0], *TEXTS[2:]], LENGTH)
    assert found.same_tokens == len(TEXTS) - 1, "no other text has this word"


def test_texts_that_are_cut_differently_are_counted_and_left_out(
    root: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [*BERT[:20], "filmy", *BERT[20:]]
    tokenizer = bert_tokenizer(root, pieces)
    more = saved(tmp_path / "more", classifier("bert", tokenizer), tokenizer)
    (tmp_path / "check.txt").write_text("a filmy mat\na film\nso sad\n")
    members = ["--member", str(small), "--member", str(more)]
    options = ["--check-data", str(tmp_path / "check.txt"), "--max-accuracy-drop", "100", "--output", "made"]
    assert main(["export", *members, *options]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("more: aligned"))
    changed = f"({len(BERT) - 20} of {len(BERT)} ids changed)"
    assert line.startswith(
        f"more: aligned to the tokenizer of small {changed}; 2 of 3 texts have the same tokens, logits differ"
    )
    check = CascadeRuntime("made").bundle.members[1].other["check"]
    assert check["max_probability_difference"] > 1e-3, "the finished member is compared with the original tokenizer"


def test_pairs_under_another_template_are_refused(
    small: Path, big: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", "--member", str(small), "--member", str(big), "--pair", "--output", "made"]) == 2
    error = capsys.readouterr().err
    assert "gives none of 16 texts the same tokens as its own" in error
    assert "(found '[CLS] a [SEP] b [SEP]', expected '<s> a </s> </s> b </s>')" in error
    assert f"cascade-rt train --tokenizer {small}" in error
    assert not (tmp_path / "made").exists()


def test_an_onnx_file_cannot_be_aligned(bundle: Path, small: Path, big: Path, tmp_path: Path) -> None:
    folder = tmp_path / "file"
    saved(folder, open_torch(str(small)).model, AutoTokenizer.from_pretrained(small))
    (folder / "model.safetensors").unlink()
    onnx.save(onnx.load(bundle / "small.onnx"), folder / "model.onnx")
    with pytest.raises(CascadeError, match="tokenizers differ in .*model.*'file' is an ONNX file, which cannot be"):
        export_bundle([str(folder), str(big)], tmp_path / "made")


def test_calibration_scales_the_original_too(small: Path, big: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": LABELS[index % 2]} for index, text in enumerate(TEXTS)]
    (tmp_path / "check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = export_bundle(
        [str(small), str(big)], tmp_path / "made", check=Check(tmp_path / "check.jsonl", calibrate=True)
    )
    member = made.members[1]
    assert abs(member.other["temperature"]["value"] - 1) > 0.1, "it changes the probabilities"
    assert member.other["check"]["max_probability_difference"] <= 1e-4


@pytest.fixture(scope="module")
def pairs() -> TaskData:
    texts: list[Text] = [(f"{WORDS[row]} film", f"{'good' if row % 2 else 'bad'} mat") for row in range(24)]
    examples = Examples(texts, [row % 2 for row in range(24)])
    return TaskData("toy", LABELS, True, "accuracy", examples.take(range(16)), examples.take(range(16, 24)))


def test_a_member_fine_tuned_under_the_bundles_tokenizer_needs_no_alignment(
    small: Path, big: Path, pairs: TaskData, tmp_path: Path
) -> None:
    still = Recipe(epochs=1, learning_rate=0.0, batch_size=8, max_length=LENGTH)
    record = finetune(str(big), pairs, tmp_path / "trained", tokenizer=str(small), recipe=still)
    answers = pipeline("text-classification", str(tmp_path / "trained"), device="cpu")("a film")
    assert len(answers) == 1, "its tokenizer returns what its model takes"
    assert record == json.loads((tmp_path / "trained" / RECORD).read_text("utf-8"))
    assert record["tokenizer"] == str(small)
    original = open_torch(str(big))
    aligned = align(original.model, original.tokenizer, AutoTokenizer.from_pretrained(small)).model
    trained = open_torch(str(tmp_path / "trained"))
    assert torch.equal(trained.model.get_input_embeddings().weight, aligned.get_input_embeddings().weight)
    made = export_bundle([str(small), str(tmp_path / "trained")], tmp_path / "made", pair=True)
    assert "alignment" not in made.members[1].other
    assert made.provenance["checkpoints"]["trained"]["training"]["tokenizer"] == "small"
    answers = TASK.probabilities(CascadeRuntime(tmp_path / "made").member_logits(PAIRS)[0][1])
    np.testing.assert_allclose(answers, torch_probabilities(trained, PAIRS), atol=1e-4)


def test_training_under_another_tokenizer_is_refused_where_it_cannot_be(
    root: Path, small: Path, big: Path, pairs: TaskData, tmp_path: Path
) -> None:
    recipe = Recipe(epochs=1, max_length=LENGTH)
    with pytest.raises(InputError, match="^no/such: no such folder"):
        finetune(str(big), pairs, tmp_path / "a", tokenizer="no/such", recipe=recipe)
    tokenizer = bert_tokenizer(root)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path / "long")
    with pytest.raises(InputError, match=f"`max_length`: found {LENGTH + 1}, expected at most {LENGTH}"):
        finetune(
            str(big), pairs, tmp_path / "b", tokenizer=str(tmp_path / "long"), recipe=replace(recipe, max_length=25)
        )
    (tmp_path / "c.training" / "checkpoint-1").mkdir(parents=True)
    unfinished = {"base": str(big), "layers": None, "tokenizer": None}
    (tmp_path / "c.training" / "run.json").write_text(json.dumps(unfinished))
    with pytest.raises(CascadeError, match="unfinished run with another tokenizer"):
        finetune(str(big), pairs, tmp_path / "c", tokenizer=str(small), recipe=recipe)


def test_difficulty_is_labelled_under_that_tokenizer_too(
    small: Path, big: Path, pairs: TaskData, tmp_path: Path
) -> None:
    summary = label_difficulty(
        str(big),
        pairs,
        tmp_path / "difficulty",
        layers=1,
        tokenizer=str(small),
        recipe=Recipe(epochs=1, max_length=LENGTH),
        splits=Splits(2, 1),
    )
    assert summary["tokenizer"] == str(small)
    with pytest.raises(InputError, match="^no/such: no such folder"):
        label_difficulty(
            str(big),
            pairs,
            tmp_path / "other",
            tokenizer="no/such",
            recipe=Recipe(max_length=LENGTH),
            splits=Splits(2, 1),
        )


def test_an_aligned_model_says_what_it_has() -> None:
    aligned = Aligned(None, np.array([3, 1, -1, 2]))
    assert (aligned.tokens, aligned.moved) == (3, 2), "an id without a token is none"
