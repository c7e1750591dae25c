"""Trimmed vocabularies: texts of the domain keep their tokens and answers, all others still get tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_export.torch_checkpoint import open_torch
from cascade_export.vocabulary import trimmed
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt import CascadeRuntime, InputError, read_bundle
from cascade_rt.cli import main

from ..conftest import WORDS, make_member
from .families import FAMILIES

DOMAIN = [" ".join(WORDS[start : start + 5]) for start in range(0, len(WORDS) // 2, 2)] * 3
KINDS = ["bert", "mpnet", "roberta", "xlm-roberta", "mmbert"]  # WordPiece, byte-level BPE, Unigram, BPE with bytes


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind in FAMILIES])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member of each kind of tokenizer, with a folder for its bundles beside it."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "member")


def test_texts_of_the_domain_keep_their_tokens_and_answers(member: Path, tmp_path: Path) -> None:
    backend = open_torch(str(member)).backend
    vocabulary = trimmed(backend, DOMAIN)
    assert len(vocabulary.own_ids) == vocabulary.backend.get_vocab_size() < backend.get_vocab_size()
    assert vocabulary.facts["tokens"] == len(vocabulary.own_ids)
    for text in DOMAIN:
        before, after = backend.encode(text, text), vocabulary.backend.encode(text, text)
        assert after.tokens == before.tokens
        assert vocabulary.own_ids[after.ids].tolist() == before.ids
        assert after.type_ids == before.type_ids

    (tmp_path / "domain.txt").write_text("\n".join(DOMAIN))
    whole = export_bundle([str(member)], tmp_path / "whole")
    bundle = export_bundle([str(member)], tmp_path / "trimmed", check=Check(vocabulary=tmp_path / "domain.txt"))
    assert bundle.provenance["vocabulary"] == vocabulary.facts
    removed = (backend.get_vocab_size() - len(vocabulary.own_ids)) * bundle.members[0].hidden_size
    assert bundle.members[0].parameters <= whole.members[0].parameters - removed
    expected, found = (
        [answer.probabilities for answer in CascadeRuntime(tmp_path / name).predict(DOMAIN)]
        for name in ("whole", "trimmed")
    )
    np.testing.assert_array_equal(found, expected)


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz .,!?'", min_size=1, max_size=40), min_size=1, max_size=5))
def test_every_text_gets_tokens(texts: list[str]) -> None:
    for kind, (backend, vocabulary) in _trimmed_backends().items():
        unknown = backend.token_to_id("[UNK]") if kind == "bert" else backend.token_to_id("<unk>")
        for text in texts:
            before, after = backend.encode(text), vocabulary.encode(text)
            assert len(after.ids) >= min(len(before.ids), 3 if text.strip() else 2)
            if unknown not in before.ids:
                assert vocabulary.id_to_token(after.ids[0]) == before.tokens[0]
                assert "[UNK]" not in after.tokens
                assert "<unk>" not in after.tokens


_MADE: dict[str, tuple[object, object]] = {}


def _trimmed_backends() -> dict[str, tuple]:  # type: ignore[type-arg]
    if not _MADE:
        from .families import _byte_pairs, _unigram, _wordpiece

        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        for kind, backend in {
            "bert": _wordpiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")),
            "roberta": _byte_pairs(),
            "xlm-roberta": _unigram("<s>", "</s>", special, 0),
        }.items():
            _MADE[kind] = (backend, trimmed(backend, DOMAIN).backend)
    return _MADE


def test_common_tokens_are_kept_until_few_held_out_texts_change() -> None:
    for kind, (backend, _) in _trimmed_backends().items():
        texts = [*(f"{word} {word}" for word in WORDS), *DOMAIN]  # most held-out texts have a word of their own
        strict, lax = trimmed(backend, texts, most=0.0), trimmed(backend, texts, most=1.0)
        assert strict.facts["cut_differently"] == 0
        assert lax.facts["cut_differently"] > 0 or kind != "bert", "whose words are tokens"
        assert set(lax.own_ids) <= set(strict.own_ids)


def test_what_cannot_be_trimmed_is_refused(member: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    command = ["export", "--member", str(member), "--output", "out", "--trim-vocabulary", "few.txt"]
    assert main(command) == 2
    assert "few.txt: found 2 texts to trim the vocabulary by, expected at least 20" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_onnx_file_is_refused(bundle: Path, tmp_path: Path, member_folders: list[Path]) -> None:
    import onnx

    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((member_folders[1] / name).read_bytes())
    onnx.save(onnx.load(bundle / "small.onnx"), folder / "model.onnx")
    (tmp_path / "domain.txt").write_text("\n".join(DOMAIN))
    with pytest.raises(InputError, match="member 'onnx' is an ONNX file; trimming the vocabulary needs torch weights"):
        export_bundle([str(folder)], tmp_path / "out", check=Check(vocabulary=tmp_path / "domain.txt"))


def test_a_network_without_layers_hashes_the_ids_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = make_member(tmp_path / "words", layers=1)
    rows = [{"text": text, "label": ["good", "bad"][number % 2]} for number, text in enumerate(DOMAIN)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "domain.txt").write_text("\n".join(DOMAIN))
    made = ["train-dan", "--tokenizer", str(words), "--train-file", "train.jsonl", "--buckets", "99", "--epochs", "2"]
    made += ["--max-length", "64"]
    assert main([*made, "--output", "dan"]) == 0
    for name, trim in {"whole": [], "trimmed": ["--trim-vocabulary", "domain.txt"]}.items():
        assert main(["export", "--member", "dan", "--output", name, *trim]) == 0
    facts = read_bundle("trimmed").provenance["vocabulary"]
    assert f"{facts['tokens']:,} of {facts['of']:,} tokens; {facts['cut_differently']} of" in capsys.readouterr().out
    whole, found = (
        [answer.probabilities for answer in CascadeRuntime(name).predict(DOMAIN)] for name in ("whole", "trimmed")
    )
    np.testing.assert_allclose(found, whole, atol=1e-6)
    sizes = [read_bundle(name).members[0].parameters for name in ("whole", "trimmed")]
    assert sizes[1] < sizes[0]
