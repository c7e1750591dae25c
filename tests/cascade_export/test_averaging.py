"""A deep averaging network as an ONNX member: torch's answers, in any batch, and everywhere that bundles run."""

from __future__ import annotations

import json
import shutil
from itertools import compress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cascade_export.averaging import PRECISIONS, write_network
from cascade_export.export import export_bundle
from cascade_export.single_file import pack
from cascade_train.averaging import AveragingConfig, AveragingForSequenceClassification, Network, new_network
from cascade_train.sources import load_classifier, load_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cascade_rt import CascadeRuntime
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.providers import OPENVINO, is_installed
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import CascadeError

from ..toy import LABELS, WORDS

TEXTS = [" ".join(WORDS[(7 * row + at) % len(WORDS)] for at in range(row % 11 + 1)) for row in range(60)]
PAIRS = [(text, TEXTS[-row]) for row, text in enumerate(TEXTS)]
NETWORK = Network(buckets=97, dimension=12, hidden=16)


def network(pair: bool, ngrams: int, seed: int = 0) -> AveragingForSequenceClassification:
    torch.manual_seed(seed)
    size = {"ngrams": ngrams, "buckets": 97, "dimension": 12, "hidden": 16}
    model = AveragingForSequenceClassification(
        AveragingConfig(vocab_size=60, network=size, pair=pair, sep_token_id=3, num_labels=5)
    )
    torch.nn.init.normal_(model.table.weight)
    model.seen.bernoulli_(0.7)
    model.eval()
    return model


def batch(texts: list[list[int]]) -> dict[str, np.ndarray]:
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for at, text in enumerate(texts):
        ids[at, : len(text)], mask[at, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def session(model: AveragingForSequenceClassification, folder: Path, precision: str) -> onnxruntime.InferenceSession:
    write_network(model, folder / "model.onnx", precision)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return onnxruntime.InferenceSession(folder / "model.onnx")


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_the_graph_answers_as_torch_does(pair: bool, ngrams: int, tmp_path: Path) -> None:
    model = network(pair, ngrams)
    exported = {name: session(model, tmp_path, name) for name in PRECISIONS}
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "int8-table": 0.1}

    @settings(max_examples=30)
    @given(st.lists(st.lists(st.integers(1, 59), min_size=1, max_size=12), min_size=1, max_size=6))
    def check(texts: list[list[int]]) -> None:
        feed = batch(texts)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, feed.values())).logits.numpy()
        for name, each in exported.items():
            np.testing.assert_allclose(each.run(None, feed)[0], expected, atol=tolerance[name])

    check()


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_int8_is_bit_identical_in_any_batch(pair: bool, tmp_path: Path) -> None:
    each, draw = session(network(pair, 3), tmp_path, "int8-table"), np.random.default_rng(0)
    texts = [draw.integers(1, 60, draw.integers(1, 40)).tolist() for _ in range(64)]
    whole = each.run(None, batch(texts))[0]
    for _ in range(20):
        rows = draw.permutation(len(texts))
        for some in np.array_split(rows, draw.integers(1, len(rows) + 1)):
            np.testing.assert_array_equal(each.run(None, batch([texts[row] for row in some]))[0], whole[some])


@pytest.fixture(scope="module")
def members(member_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[str]]:
    """A network, for single texts or pairs, and two members with layers."""
    tokenizer = AutoTokenizer.from_pretrained(member_folders[0])
    found = {}
    for pair in (False, True):
        folder = tmp_path_factory.mktemp("network") / "DAN"
        torch.manual_seed(1)
        model = new_network(tokenizer, LABELS, NETWORK, pair=pair)
        torch.nn.init.normal_(model.table.weight, std=4)
        model.seen.bernoulli_(0.9)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[pair] = [str(member_folders[-1]), str(folder)]
    return found


@pytest.fixture(scope="module")
def bundles(members: dict[bool, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    found = {pair: tmp_path_factory.mktemp("bundle") / "bundle" for pair in members}
    for pair, folder in found.items():
        export_bundle(
            members[pair], folder, pair=pair, max_length=24, precision={"DAN": "int8", "": "fp32"}, threshold=0.5
        )
    return found


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_it_is_the_first_member_of_a_bundle(pair: bool, bundles: dict[bool, Path]) -> None:
    with CascadeRuntime(bundles[pair]) as runtime:
        entry = runtime.bundle.members[0]
        assert (entry.name, entry.layers, entry.precision) == ("DAN", 0, "int8-table")
        assert runtime.bundle.format_version == 3
        assert entry.other["batch_difference"] == 0
        assert entry.other["averaging_network"]["buckets"] == 97
        assert 0 < entry.cost(16) < runtime.bundle.members[1].cost(16)
        texts = PAIRS if pair else TEXTS
        together = runtime.predict(texts)
        assert {answer.exit for answer in together} == {0, 1}
        assert [runtime.predict([text])[0].exit for text in texts] == [answer.exit for answer in together]


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_it_is_in_the_single_file(pair: bool, bundles: dict[bool, Path], tmp_path: Path) -> None:
    bundle = pack(bundles[pair], tmp_path / "cascade.onnx")
    whole = onnxruntime.InferenceSession(tmp_path / "cascade.onnx")
    tokenizer = TextTokenizer(bundles[pair] / bundle.tokenizer_file, bundle.max_length, pair)
    texts = PAIRS if pair else TEXTS
    with CascadeRuntime(bundles[pair]) as runtime:
        expected = runtime.predict(texts)
    feed = tokenizer.encode(texts).batch(np.arange(len(texts)))
    probabilities, exits, _ = whole.run(None, feed | {"thresholds": np.array([0.5])})
    assert exits.tolist() == [answer.exit for answer in expected]
    np.testing.assert_allclose(probabilities, [answer.probabilities for answer in expected], atol=1e-5)


@pytest.mark.skipif(not is_installed(OPENVINO), reason="needs the extra openvino")
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_it_runs_on_openvino(pair: bool, bundles: dict[bool, Path]) -> None:
    texts = PAIRS if pair else TEXTS
    logits = [
        runtime.member_logits(texts)[0][0]
        for provider in ("cpu", OPENVINO)
        if (runtime := CascadeRuntime(bundles[pair], members=["DAN"], **Execution(provider).arguments()))
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)


@pytest.mark.parametrize("asked", ["int8", "int8-blocks"])
def test_its_only_int8_is_that_of_the_table(asked: str, members: dict[bool, list[str]], tmp_path: Path) -> None:
    made = export_bundle(members[False][1:], tmp_path / "bundle", max_length=24, precision=asked)
    assert [entry.precision for entry in made.members] == ["int8-table"]


def test_it_cannot_be_aligned_to_another_tokenizer(members: dict[bool, list[str]], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(members[False][1])
    model = new_network(tokenizer, LABELS, NETWORK, pair=False)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "other"]
    (tmp_path / "DAN").mkdir()
    model.save_pretrained(tmp_path / "DAN")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    type(tokenizer)(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "DAN")
    with pytest.raises(CascadeError, match="tokenizer"):
        export_bundle([members[False][0], str(tmp_path / "DAN")], tmp_path / "bundle", max_length=24)


def test_several_labels_through_the_task(members: dict[bool, list[str]], tmp_path: Path) -> None:
    """The network learns which labels a text has, and the bundle gives them."""
    folder = tmp_path / "network"
    shutil.copytree(members[False][1], folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    model, tokenizer = load_classifier(str(folder)).train(), load_tokenizer(str(folder))
    texts = ["good cat", "cat", "good dog", "the dog"]
    wanted = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        model(encoded["input_ids"], encoded["attention_mask"], labels=wanted).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    export_bundle([str(folder)], tmp_path / "bundle", max_length=24, precision="int8")
    with CascadeRuntime(tmp_path / "bundle") as runtime:
        answers = [answer.labels for answer in runtime.predict(texts)]
    assert answers == [tuple(compress(LABELS, row)) for row in wanted.tolist()]
