"""Checkpoints of others: whatever is odd about a folder is answered as the original answers, or refused in one line."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cascade_export.export import export_bundle
from cascade_export.random_weights import write_random_members
from cascade_export.torch_checkpoint import open_torch
from cascade_train.analysis import representations
from cascade_train.compat import MAJOR, quiet
from cascade_train.distil import load_encoder
from cascade_train.exits import open_exits
from cascade_train.finetune import load_base, load_member
from cascade_train.settings import guarded
from cascade_train.sources import load_tokenizer

from cascade_rt import CascadeRuntime
from cascade_rt.errors import BundleError, InferenceError, InputError, MissingExtraError

from ..conftest import LABELS, WORDS
from ..toy import vocabulary
from .families import FAMILIES

_TRUST = "trust_remote_code"
REMOVED = object()


def edit(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Change keys of a folder's JSON file; REMOVED takes one out."""
    path = folder / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    found |= changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not REMOVED}))
    return folder


@pytest.fixture
def folder(member_folders: list[Path], tmp_path: Path) -> Path:
    """A copy of a classifier, to damage."""
    return shutil.copytree(member_folders[0], tmp_path / "member")


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def a_folder(file: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return spoil


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, **changes)


def tokenizer_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, "tokenizer_config.json", **changes)


def without(*files: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return spoil


TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
HALF = {"rope_type": "default", "rope_theta": 50.0}

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "regression": (config(problem_type="regression"), "problem_type .*answers labels, not numbers"),
    "another function": (
        config(function_to_apply="sigmoid"),
        "function_to_apply .*expected softmax, as of problem_type",
    ),
    "functions that contradict": (
        config(problem_type="multi_label_classification", function_to_apply="softmax"),
        "function_to_apply .*expected sigmoid, as of problem_type multi_label_classification",
    ),
    "settings of a task": (
        config(task_specific_params={"text-classification": {"function_to_apply": "none"}}),
        "task_specific_params .*move them",
    ),
    "ids from 1": (config(id2label={"1": "a", "2": "b", "3": "c"}), r"ids \[1, 2, 3\]; expected all from 0"),
    "ids with a gap": (config(id2label={"0": "a", "1": "b", "3": "c"}), r"ids \[0, 1, 3\]; expected all from 0"),
    "ids that are words": (config(id2label={"a": 0, "b": 1}), "id2label .*the name of each label by its id"),
    "a list of labels": (config(id2label=["a", "b", "c"]), "id2label .*the name of each label by its id"),
    "a label that is null": (config(id2label={"0": "a", "1": "b", "2": None}), "found id2label null; .*as text"),
    "fewer labels than logits": (
        config(id2label={"0": "a", "1": "b"}),
        "cannot be opened .*size mismatch",
    ),
    "code of the repository": (config(auto_map={"AutoConfig": "mine.Mine"}), "auto_map for AutoConfig.*never runs"),
    "a model in the repository": (
        config(auto_map={"AutoModelForSequenceClassification": "mine.Mine"}),
        "auto_map for AutoModelForSequenceClassification.*never runs",
    ),
    "a tokenizer in the repository": (
        tokenizer_config(auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        "auto_map for AutoTokenizer.*never runs",
    ),
    "a tokenizer as written once": (tokenizer_config(auto_map=["mine.Mine", None]), "auto_map for AutoTokenizer"),
    "quantised weights": (config(quantization_config={"quant_method": "gptq"}), "quantization_config .*dequantize"),
    "settings of transformers 5": (config(rope_parameters=HALF), "rope_parameters .*reads for a bert"),
    "special tokens that are split": (tokenizer_config(split_special_tokens=True), "split_special_tokens .*false"),
    "an unknown architecture": (config(model_type="mine"), "cannot be opened .*mine"),
    "no architecture": (config(model_type=REMOVED), "cannot be opened .*model_type"),
    "no config.json": (without("config.json"), "has no config.json"),
    "a config.json that is not JSON": (write("config.json", b"{"), "cannot read config.json .*expected a JSON object"),
    "a config.json that is a list": (write("config.json", b"[]"), "cannot read config.json .found list.*JSON object"),
    "a config.json that is a folder": (a_folder("config.json"), "cannot read config.json .*Is a directory"),
    "a tokenizer_config.json that is not JSON": (write("tokenizer_config.json", b"{"), "cannot read tokenizer_config"),
    "no weights": (without("model.safetensors"), "has no weights; expected model.safetensors"),
    "another function of a CrossEncoder": (
        config(sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"}),
        "sentence_transformers .*Tanh.*expected softmax",
    ),
    "room for special tokens alone": (tokenizer_config(model_max_length=2), "takes 2 tokens .*expected 3 or more"),
    "a broken sentencepiece model": (
        lambda folder: (without(*TOKENIZER)(folder), write("spm.model", b"version https://git-lfs")(folder)),
        "cannot read spm.model .*download the file again",
    ),
    "weights of no bytes": (write("model.safetensors", b""), "cannot be opened .*header"),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999]),
        "cannot be opened .*",
    ),
    "weights of another shape": (config(vocab_size=7), "cannot be opened .*size mismatch"),
    "weights of another width": (config(hidden_size=64), "cannot be opened .*size mismatch"),
    "more layers than weights": (config(num_hidden_layers=3), "has no weights for bert.encoder.layer.1"),
    "a broken setting": (config(num_attention_heads=7), "cannot be opened .*multiple of the number of attention"),
    "a broken function": (config(hidden_act="mine"), "cannot be opened .*mine"),
    "no tokenizer": (without(*TOKENIZER), "has no tokenizer; .*tokenizer.json"),
    "a broken tokenizer": (write("tokenizer.json", b"{}"), "cannot be opened"),
}
if MAJOR < 5:  # which reads tokenizer.json, whatever the class
    REFUSED["an unknown tokenizer"] = (
        tokenizer_config(tokenizer_class="MineTokenizer"),
        "cannot be opened .*MineTokenizer",
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_answers_or_cannot_be_opened_is_refused_in_one_line(folder: Path, name: str) -> None:
    spoil, says = REFUSED[name]
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        open_torch(str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "said",
    [
        {"problem_type": "multi_label_classification"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
    ],
)
def test_a_classifier_of_several_labels_answers_as_transformers(
    folder: Path, said: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import pipeline

    edit(folder, **said)
    export_bundle([str(folder)], tmp_path / "bundle")
    theirs = pipeline("text-classification", model=str(folder), top_k=None, function_to_apply="sigmoid")
    with CascadeRuntime(tmp_path / "bundle") as runtime:
        assert runtime.task.name == "multi_label"
        for text in ("good cat", "a bad dog runs", "film"):
            expected = {row["label"]: row["score"] for row in theirs([text])[0]}
            (answer,) = runtime.predict([text])
            assert answer.probabilities == pytest.approx([expected[label] for label in LABELS], abs=1e-5)
            assert answer.labels == tuple(label for label in LABELS if expected[label] > 0.5)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_read_as_float32(folder: Path, tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    small = AutoModelForSequenceClassification.from_pretrained(folder, dtype=kind)
    with quiet():
        small.save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    assert kind in (found.get("dtype"), found.get("torch_dtype"))
    opened = open_torch(str(folder))
    _, member = load_member(str(folder), LABELS, "teacher")
    models = [opened.model, member, load_base(str(folder), LABELS, None)[1], load_encoder(str(folder))[1]]
    for model in models:
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    export_bundle([str(folder)], tmp_path / "bundle")
    exact = small.float().eval()
    texts = ["a great film", "never boring"]
    with CascadeRuntime(tmp_path / "bundle") as runtime, torch.inference_mode():
        for text, answer in zip(texts, runtime.predict(texts), strict=True):
            expected = exact(**opened.tokenizer(text, return_tensors="pt")).logits.softmax(dim=-1)[0].tolist()
            assert list(answer.probabilities) == pytest.approx(expected, abs=1e-5)


def test_rotary_positions_as_transformers_5_writes_them_are_never_ignored(tmp_path: Path) -> None:
    folder = FAMILIES["modernbert"](tmp_path / "member")
    theta = {"rope_type": "default", "rope_theta": 10_000.0}
    edit(folder, rope_parameters={"full_attention": theta, "sliding_attention": theta})
    if MAJOR < 5:
        with pytest.raises(InputError, match="found rope_parameters .*transformers 4.* reads for a modernbert"):
            open_torch(str(folder))
    else:
        assert open_torch(str(folder)).config.rope_parameters["full_attention"]["rope_theta"] == 10_000


def test_settings_of_how_a_model_runs_are_not_those_of_the_folder(folder: Path) -> None:
    edit(folder, _attn_implementation="kernels-community/flash-attn", return_dict=False, torchscript=True)
    model = open_torch(str(folder)).model
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert model(**model.dummy_inputs).logits.shape[1] == len(LABELS)


def test_a_member_without_all_its_weights_is_refused_as_a_teacher_too(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    with pytest.raises(InputError, match="has no weights for bert.encoder.layer.1"):
        load_member(str(folder), LABELS, "teacher")


def test_a_file_in_place_of_a_folder_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=f"found a file; expected the folder of a model: {folder}"):
        open_torch(str(folder / "model.safetensors"))


def test_a_sentencepiece_model_without_its_package_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(*TOKENIZER)(folder)
    write("spm.model", b"")(folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r"reading spm.model needs .*cascade-rt\[export\]"):
        load_tokenizer(str(folder))


def test_a_sentencepiece_model_alone_is_read(folder: Path, tmp_path: Path) -> None:
    """As DeBERTa-v3's folders are."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    without(*TOKENIZER)(folder)
    SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(WORDS[start : start + 9]) for start in range(0, len(WORDS), 3)),
        model_prefix=str(folder / "spm"),
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    (folder / "spm.vocab").unlink()
    pieces = SentencePieceProcessor(model_file=str(folder / "spm.model"))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    settings = DebertaV2Config(vocab_size=len(pieces) + 1, max_position_embeddings=64, **size, **labels)
    with quiet():
        DebertaV2ForSequenceClassification(settings).save_pretrained(folder)
    edit(folder, "tokenizer_config.json", tokenizer_class="DebertaV2Tokenizer", do_lower_case=False, vocab_type="spm")
    tokenizer = load_tokenizer(str(folder))
    text = "never a good film, not a bad one"
    assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text), 2]
    export_bundle([str(folder)], tmp_path / "bundle")  # compares with torch
    with CascadeRuntime(tmp_path / "bundle") as runtime:
        assert runtime.predict([text])[0].label in LABELS


def bare_backend(**parts: Any) -> Any:
    """BERT's tokenizer with other parts."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    written = json.loads(BertWordPieceTokenizer(vocabulary())._tokenizer.to_str()) | parts
    return Tokenizer.from_str(json.dumps(written))


def test_a_tokenizer_without_padding_and_special_tokens_answers_as_the_original(folder: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast, pipeline

    PreTrainedTokenizerFast(
        tokenizer_object=bare_backend(padding=None, post_processor=None), unk_token="[UNK]"
    ).save_pretrained(folder)
    edit(folder, pad_token_id=None)
    export_bundle([str(folder)], tmp_path / "bundle")
    theirs = pipeline("text-classification", model=str(folder), tokenizer=str(folder), top_k=None)
    with CascadeRuntime(tmp_path / "bundle") as runtime:
        for text in ("a great film", "[PAD] sad [SEP]", "it was never boring but never good " * 12):
            expected = {one["label"]: one["score"] for one in theirs(text, truncation=True, max_length=64)[0]}
            (answer,) = runtime.predict([text])
            assert dict(zip(LABELS, answer.probabilities, strict=True)) == pytest.approx(expected, abs=1e-5)
        assert len(runtime.predict(["", "a film", "sad sad sad"])) == 3


def test_a_tokenizer_that_transformers_5_has_written_is_read(folder: Path) -> None:
    before = load_tokenizer(str(folder))
    kept = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "model_max_length", "model_input_names")
    written = {key: getattr(before, key) for key in kept} | {"backend": "tokenizers", "is_local": True}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(written | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["film"]})
    )
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    after = open_torch(str(folder)).tokenizer
    texts = (["A great film", "a", ""], ["sad", "b", "[PAD]"])
    assert after(*texts).data == before(*texts).data
    assert (after.pad_token_id, after.model_max_length) == (before.pad_token_id, before.model_max_length)


def test_case_of_tokenizer_config_is_that_of_the_answers(folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    edit(folder, "tokenizer_config.json", do_lower_case=False)
    export_bundle([str(folder)], tmp_path / "bundle")
    theirs = pipeline("text-classification", model=str(folder), tokenizer=str(folder))
    with CascadeRuntime(tmp_path / "bundle") as runtime:
        scores = [runtime.predict([text])[0].score for text in ("a great film", "A Great FILM")]
    assert scores == pytest.approx([theirs(text)[0]["score"] for text in ("a great film", "A Great FILM")], abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_tokens_without_an_embedding_are_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    before = len(tokenizer)
    tokenizer.add_tokens(["[ORDER]", "[NAME]"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"2 tokens without an embedding \('\[ORDER\]' is {before}, expected below"):
        open_torch(str(folder))
    with pytest.raises(InputError, match="2 tokens without an embedding"):
        load_base(str(folder), ("no", "yes"), None)


def changed_weights(folder: Path, **changes: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, change in changes.items():
        key = next(key for key in weights if key.endswith(name))
        found = change(weights.pop(key))
        weights |= {} if found is None else {key: found.contiguous()}
    save_file(weights, file, {"format": "pt"})


def test_one_token_type_is_enough_for_single_texts(folder: Path) -> None:
    changed_weights(folder, **{"token_type_embeddings.weight": lambda weight: weight[:1]})
    edit(folder, type_vocab_size=1)
    assert not open_torch(str(folder)).pair
    with pytest.raises(InputError, match=r"gives pairs 2 token types, expected at most 1 .type_vocab_size"):
        open_torch(str(folder), pair=True)


def test_weights_that_are_not_numbers_are_refused(folder: Path) -> None:
    changed_weights(folder, **{"classifier.weight": lambda weight: weight * float("nan")})
    with pytest.raises(InputError, match=r"NaN or infinity in its weights \(classifier.weight\)"):
        open_torch(str(folder))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda folder: changed_weights(folder, **{"0.output.dense.weight": lambda _: None}),
            "no weights of the right",
        ),
        (lambda folder: edit(folder, vocab_size=200), "no weights of the right shape for 1 parts .*word_embeddings"),
        (config(auto_map={"AutoModel": "mine.Mine"}), "auto_map for AutoModel"),
    ],
)
def test_an_encoder_to_train_has_all_its_weights_and_a_tokenizer(
    folder: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=says):
        load_base(str(folder), ("no", "yes"), None)


def test_a_new_head_has_none_of_the_old_ones_settings(folder: Path) -> None:
    edit(folder, problem_type="multi_label_classification", function_to_apply="sigmoid")
    _, model = load_base(str(folder), ("no", "yes"), None)
    assert model.config.problem_type == "single_label_classification"
    assert model.config.function_to_apply is None
    assert model.config.num_labels == 2


def test_code_of_a_repository_neither_runs_nor_is_asked_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = folder / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})
    edit(folder, "cascade_train.json", exits={"kind": "pabee", "after": [1]})

    def asked(*_: object) -> str:
        pytest.fail("asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    for opened in (
        lambda: open_torch(str(folder)),
        lambda: load_base(str(folder), ("no", "yes"), None),
        lambda: load_member(str(folder), LABELS, "teacher"),
        lambda: load_encoder(str(folder)),
        lambda: load_tokenizer(str(folder)),
        lambda: open_exits(folder),
        lambda: representations(str(folder), ["a film"], 16),
        lambda: write_random_members([(1, 32)], folder, tokenizer=str(folder)),
    ):
        with pytest.raises(InputError, match=r"auto_map for Auto\w+, code of the repository .*never runs"):
            opened()
    assert not ran.exists()


def calls(folder: Path, names: set[str]) -> list[tuple[Path, ast.Call]]:
    """Return every call of a function or method of these names in a folder's modules."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names:
                found.append((file, node))
    return found


def test_every_checkpoint_is_opened_in_one_place_and_without_its_code() -> None:
    root = Path(__file__).parents[2]
    openers = {"from_pretrained"}
    found = calls(root / "export", openers)
    assert [file.name for file, _ in found] == ["sources.py"]
    others = [opened for opened in calls(root / "benchmarks", openers) if "ORTOptimizer" not in ast.dump(opened[1])]
    for file, call in [*found, *others]:  # ORTOptimizer is given an open model
        passed = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == _TRUST}
        assert passed == {_TRUST: False}, f"{file}:{call.lineno}"


def test_an_architecture_that_cannot_be_exported_is_named(folder: Path, tmp_path: Path) -> None:
    from transformers import FNetConfig, FNetForSequenceClassification

    config = FNetConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, intermediate_size=32, max_position_embeddings=64
    )
    FNetForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(InputError, match=r"a fnet cannot be exported to ONNX.*families.md") as caught:
        export_bundle([str(folder)], tmp_path / "bundle")
    assert str(caught.value).startswith(f"{folder}: ")
    assert not (tmp_path / "bundle").exists()


def test_the_cause_of_an_error_is_kept_and_memory_is_not_blamed_on_the_folder() -> None:
    def raising(error: Exception) -> None:
        with guarded("x", "cannot be opened", "again"):
            raise error

    with pytest.raises(InputError, match=r"^x: cannot be opened \('a'\); again$") as caught:
        raising(KeyError("a"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(InferenceError, match="x: cannot be opened, memory ran out; free memory"):
        raising(MemoryError())
    with pytest.raises(BundleError, match="^as it is$"):
        raising(BundleError("as it is"))
