"""Folders as the libraries that people use write them: those that are no classifier of texts are refused by name.

Those that only look so are classifiers, and answer as the original does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cascade_export.export import export_bundle
from cascade_export.onnx_checkpoint import is_onnx, open_onnx
from cascade_export.torch_checkpoint import open_torch
from cascade_train.finetune import load_base
from onnx import helper, numpy_helper

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.errors import InputError

from .families import FAMILIES
from .test_foreign import edit

_TEXTS = ["a great film", "so sad", "the cat sat on the mat " * 5]
Change = Callable[[Path], object]


def saved_as(auto_class: str, family: str = "bert", **settings: Any) -> Change:
    """Replace the model by a tiny one of another kind, as transformers saves it."""

    def write(folder: Path) -> None:
        import torch
        import transformers

        shutil.rmtree(folder)
        FAMILIES[family](folder)
        torch.manual_seed(2)
        config = transformers.AutoConfig.from_pretrained(folder, architectures=None, **settings)
        getattr(transformers, auto_class).from_config(config).save_pretrained(folder)

    return write


def put(name: str, content: object) -> Change:
    """Write a file: bytes, or JSON."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return write


def moved(*names: str, into: str | None = None) -> Change:
    """Move files into a folder below, or remove them."""

    def move(folder: Path) -> None:
        for name in names:
            if into is None:
                (folder / name).unlink()
            else:
                (folder / into).mkdir(exist_ok=True)
                (folder / name).rename(folder / into / name)

    return move


def config(**changes: Any) -> Change:
    return lambda folder: edit(folder, **changes)


def module(number: int, path: str, kind: str) -> dict[str, object]:
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


# As sentence-transformers 3, 4 and 6 and SetFit write them; 6 says what a CrossEncoder is beside config.json.
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
CLASSIFIER = put("modules.json", [module(0, "", "Transformer")])
ENCODER = [
    saved_as("AutoModel"),
    put("modules.json", [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")]),
    put("1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
    put("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None}),
]
SETFIT = [*ENCODER, put("config_setfit.json", {"labels": ["no", "yes"], "normalize_embeddings": False})]
WEIGHTS = ("model.safetensors", "config.json")
LORA = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "mine/bert", "r": 8}


def version_6(activation: str, **settings: object) -> Change:
    found: dict[str, object] = {"model_type": "CrossEncoder", "activation_fn": activation, "prompts": {}}
    return put("config_sentence_transformers.json", found | settings)


ONE_SCORE = r"found one label, a model of one score, as rerankers and regressions are; .* with cascade-rt train"
OF_CONFIG: dict[str, tuple[list[Change], str]] = {
    "a reranker": ([saved_as("AutoModelForSequenceClassification", num_labels=1)], ONE_SCORE),
    "a regression": (
        [saved_as("AutoModelForSequenceClassification", num_labels=1, problem_type="regression")],
        ONE_SCORE,
    ),
    "a regression of three numbers": (
        [saved_as("AutoModelForSequenceClassification", problem_type="regression")],
        "found problem_type .*regression",
    ),
    "a CrossEncoder of one score, version 3": (
        [config(id2label={"0": "LABEL_0"}, sbert_ce_default_activation_function=SIGMOID)],
        ONE_SCORE,
    ),
    "a CrossEncoder of one score, version 4": (
        [config(id2label={"0": "LABEL_0"}, sentence_transformers={"activation_fn": SIGMOID, "version": "4.1.0"})],
        ONE_SCORE,
    ),
    "a CrossEncoder of one score, version 6": (
        [config(id2label={"0": "LABEL_0"}), CLASSIFIER, version_6(SIGMOID)],
        ONE_SCORE,
    ),
    "a CrossEncoder with a prompt": (
        [CLASSIFIER, version_6(IDENTITY, prompts={"query": "query: "}, default_prompt_name="query")],
        r"config_sentence_transformers.json: found default_prompt_name \"query\".*adds no prompt",
    ),
    "a CrossEncoder with a second module": (
        [put("modules.json", [module(0, "", "Transformer"), module(1, "1_Dense", "Dense")])],
        "modules.json: found 2 modules, expected a classifier alone",
    ),
    "modules that are no list": ([put("modules.json", {})], "cannot read modules.json .*expected a JSON array"),
    "an encoder of sentence-transformers": (
        ENCODER,
        "found modules.json, an encoder .*without a classifier; ",
    ),
    "a SetFit model with a head of scikit-learn": (
        [*SETFIT, put("model_head.pkl", b"\x80\x04\x8c\x07sklearn")],
        "found config_setfit.json, a model of SetFit, whose classifier is pickled.*fine-tune this folder",
    ),
    "a SetFit model with a differentiable head": (
        [*SETFIT, put("model_head.pkl", b"\x80\x04\x8c\x05torch")],
        "found config_setfit.json, a model of SetFit, whose classifier is pickled.*fine-tune this folder",
    ),
    "a SetFit model before version 1": ([*ENCODER, put("model_head.pkl", b"\x80")], "found model_head.pkl, a model of"),
    "a classifier of tokens": (
        [saved_as("AutoModelForTokenClassification")],
        "not a fine-tuned classifier .*BertForTokenClassification.*fine-tune",
    ),
    "ModernBERT for tokens": (
        [saved_as("AutoModelForTokenClassification", "modernbert")],
        "not a fine-tuned classifier .*ModernBertForTokenClassification.*fine-tune",
    ),
    "a masked language model": ([saved_as("AutoModelForMaskedLM")], "BertForMaskedLM, expected one that ends in"),
    "one that answers questions": ([saved_as("AutoModelForQuestionAnswering")], "BertForQuestionAnswering, expected"),
    "one that chooses": ([saved_as("AutoModelForMultipleChoice")], "BertForMultipleChoice, expected"),
    "an encoder": ([saved_as("AutoModel")], "the architecture BertModel, expected"),
    "an architecture as text": ([config(architectures="BertModel")], "the architecture BertModel, expected"),
}
"""Refused by what is written beside the weights, whatever these are."""

OF_WEIGHTS: dict[str, tuple[list[Change], str]] = {
    "tokens, without architectures": (
        [saved_as("AutoModelForTokenClassification"), config(architectures=None)],
        "has no weights for bert.pooler.dense",
    ),
    "ModernBERT for tokens, without architectures": (
        [saved_as("AutoModelForTokenClassification", "modernbert"), config(architectures=None)],
        r'found no architectures, .*of tokens too; .* add "architectures": \["ModernBertForSequenceClassification"\]',
    ),
    "a language model, without architectures": (
        [saved_as("AutoModelForMaskedLM", "modernbert"), config(architectures=None)],
        "has no weights for classifier",
    ),
    "an encoder that says it classifies": (
        [saved_as("AutoModel"), config(architectures=["BertForSequenceClassification"])],
        "has no weights for classifier",
    ),
    "an adapter beside its base": (
        [put("adapter_config.json", LORA), put("adapter_model.safetensors", b"")],
        "found adapter_config.json, an adapter of mine/bert; .*merge_and_unload",
    ),
    "an adapter alone": (
        [moved(*WEIGHTS), put("adapter_config.json", LORA), put("adapter_model.safetensors", b"")],
        "found adapter_config.json, an adapter of mine/bert; .*merge_and_unload",
    ),
    "weights of llama.cpp alone": (
        [moved(*WEIGHTS), put("model-Q8_0.gguf", b"GGUF")],
        "found model-Q8_0.gguf, quantised weights of llama.cpp; expected model.safetensors",
    ),
    "weights of TensorFlow": (
        [moved("model.safetensors"), put("tf_model.h5", b"")],
        "found tf_model.h5, weights of TensorFlow; .*save_pretrained",
    ),
    "weights of Flax": ([moved("model.safetensors"), put("flax_model.msgpack", b"")], "flax_model.msgpack, weights of"),
    "a graph of OpenVINO": (
        [moved("model.safetensors"), put("openvino_model.xml", b"")],
        "found openvino_model.xml, a graph of OpenVINO",
    ),
    "weights in 4 bits": (
        [config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})],
        "found quantization_config .*dequantize",
    ),
    "a folder of checkpoints": (
        [moved(*WEIGHTS, into="checkpoint-500"), put("1_Pooling/config.json", {})],
        "has no config.json; give a folder inside it: checkpoint-500$",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny classifier of texts, to change."""
    return FAMILIES["bert"](tmp_path / "member")


def refused(folder: Path, changes: list[Change], says: str) -> None:
    for change in changes:
        change(folder)
    with pytest.raises(InputError, match=says) as caught:
        (open_onnx if is_onnx(str(folder)) else open_torch)(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("kind", OF_CONFIG | OF_WEIGHTS)
def test_a_folder_that_is_no_classifier_is_refused_in_one_line(folder: Path, kind: str) -> None:
    changes, says = (OF_CONFIG | OF_WEIGHTS)[kind]
    refused(folder, changes, says)


@pytest.mark.parametrize("kind", OF_CONFIG)
def test_the_same_rules_hold_beside_an_onnx_file(folder: Path, kind: str) -> None:
    changes, says = OF_CONFIG[kind]
    refused(folder, [*changes, moved("model.safetensors"), graph_of("logits", mean=True)], says)


def graph_of(output: str, labels: int = 3, *, mean: bool) -> Change:
    """Write model.onnx: rows of a table by token, or their mean over the tokens of a text."""

    def write(folder: Path) -> None:
        table = np.random.default_rng(5).normal(size=(1000, labels)).astype(np.float32)
        weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "tokens")]
        rows = "rows" if mean else output
        nodes = [helper.make_node("Gather", ["table", "input_ids"], [rows])]
        nodes += [helper.make_node("ReduceMean", ["rows", "tokens"], [output], keepdims=0)] if mean else []
        ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["texts", "tokens"])
        made = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "kind", [ids], [made], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, folder / "model.onnx")

    return write


AS_IF = [moved("model.safetensors"), config(architectures=None)]
TOKENS = (
    "model.onnx: answers for each token, as classifiers of tokens, language models and encoders do; expected logits"
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([*AS_IF, graph_of("logits", mean=False)], TOKENS),
        ([*AS_IF, graph_of("last_hidden_state", 32, mean=False)], TOKENS),
        ([*AS_IF, graph_of("logits", 1, mean=True)], "model.onnx: answers with one score, as rerankers"),
        (
            [*AS_IF, graph_of("start_logits", 9, mean=True)],
            r"answers start_logits of shape \(1, 9\), expected \(1, 3\), for token ids of shape \(1, 5\)",
        ),
    ],
    ids=["tokens", "encoder", "one score", "other labels"],
)
def test_a_graph_says_what_it_is_where_config_json_does_not(folder: Path, changes: list[Change], says: str) -> None:
    refused(folder, changes, says)


HANDLED: dict[str, list[Change]] = {
    "no architectures": [config(architectures=None)],
    "a CrossEncoder, version 3": [config(sbert_ce_default_activation_function=IDENTITY)],
    "a CrossEncoder, version 4": [config(sentence_transformers={"activation_fn": IDENTITY, "version": "4.1.0"})],
    "a CrossEncoder, version 6": [CLASSIFIER, version_6(IDENTITY)],
    "weights of TensorFlow beside torch's": [put("tf_model.h5", b"")],
    "a language model first": [config(architectures=["BertForMaskedLM", "BertForSequenceClassification"])],
}


@pytest.mark.parametrize("kind", HANDLED)
def test_a_classifier_answers_as_the_original_whatever_lies_beside_it(folder: Path, kind: str, tmp_path: Path) -> None:
    from transformers import pipeline

    theirs = pipeline("text-classification", model=str(folder), tokenizer=str(folder))(_TEXTS, truncation=True)
    for change in HANDLED[kind]:
        change(folder)
    export_bundle([str(folder)], tmp_path / "bundle")
    found = CascadeRuntime(tmp_path / "bundle").predict(_TEXTS)
    assert [one.label for one in found] == [one["label"] for one in theirs]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


@pytest.mark.parametrize(
    "changes", [SETFIT, ENCODER, OF_CONFIG["a reranker"][0], OF_CONFIG["ModernBERT for tokens"][0]]
)
def test_what_the_messages_advise_can_be_done(folder: Path, changes: list[Change]) -> None:
    """Each of these is a base for `cascade-rt train`, whose head is new."""
    for change in changes:
        change(folder)
    _, model = load_base(str(folder), ("no", "yes"), None)
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert (model.config.num_labels, model.config.problem_type) == (2, "single_label_classification")


def test_a_command_prints_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("adapter_config.json", LORA)(folder)
    assert main(["export", "--member", str(folder), "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert "an adapter of mine/bert" in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
