"""The export is tried before the training: what cannot be exported is refused while nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import cascade_build.build as building
import pytest
from cascade_build.trial import Start, try_export
from cascade_train.exits import KINDS

from cascade_rt.cli import main
from cascade_rt.errors import CascadeError

from ..conftest import WORDS, make_member

ROWS = [f"{word} {'good' if row % 2 else 'bad'},{row % 2}" for row, word in enumerate(WORDS)]
TEXTS = "\n".join(["text,label", *ROWS])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_member(tmp_path_factory.mktemp("base") / "3L", layers=3, spread=0.05)


@pytest.fixture(scope="module")
def unknown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that torch can train and nothing can export: it has Fourier transforms in place of attention."""
    from transformers import AutoTokenizer, FNetConfig, FNetForSequenceClassification

    folder = tmp_path_factory.mktemp("unknown") / "fnet"
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    FNetForSequenceClassification(FNetConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a training begins."""

    def train(*_: object, **__: object) -> None:
        raise AssertionError("nothing is trained")

    monkeypatch.setattr("transformers.Trainer.train", train)


@pytest.mark.usefixtures("untrained")
def test_an_encoder_that_cannot_be_exported_is_refused_before_it_is_trained(
    unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused_unless_told_to("train", unknown, tmp_path, capsys)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("command", ["distil --layers 1 --no-bf16", "train-exits --kind pabee"])
def test_a_student_and_a_multi_exit_model_are_tried_too(
    command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sources: str | list[str], *_: object, **__: object) -> None:
        raise CascadeError(f"{sources if isinstance(sources, str) else sources[0]}: no")

    monkeypatch.setattr("cascade_build.trial.export_exits", refuse)  # the whole model, as one
    monkeypatch.setattr("cascade_build.trial.export_bundle", refuse)
    _refused_unless_told_to(command, base, tmp_path, capsys)


def _refused_unless_told_to(command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.csv").write_text(TEXTS)
    data = "--texts" if command.startswith("distil") else "--train-file"
    arguments = [*command.split(), data, "data.csv", "--base", str(base), "--output", "out", "--max-length", "16"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"a member made of {base} could not be exported: {base.name}: " in error
    assert "or train it without this check (--no-export-check)" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]
    with pytest.raises(AssertionError, match="nothing is trained"):
        main([*arguments, "--no-export-check"])


@pytest.mark.usefixtures("untrained")
def test_an_output_that_exists_is_refused_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.csv").write_text(TEXTS)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("cascade_build.trial.export_bundle", None)
    assert main(["train", "--train-file", "data.csv", "--base", str(base), "--output", "out"]) == 2
    assert "out exists" in capsys.readouterr().err


def test_a_build_tries_all_members_together_and_once(
    base: Path, unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{one} {other} {third}" for one in WORDS[:9] for other in WORDS[9:18] for third in WORDS[18:26]]
    rows = [f"{text},{'up' if row % 2 else 'down'}" for row, text in enumerate(texts[:600])]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))

    def train(member: object, *_: object) -> None:
        raise CascadeError("training begins")

    monkeypatch.setattr(building, "_train", train)
    common = ["build", "--train-file", "data.csv", "--max-length", "16", "--no-bf16", "--output", "bundle"]
    assert main([*common, "--big", str(base), "--small", f"{unknown}=1"]) == 2
    assert "could not be exported: 1L: " in capsys.readouterr().err
    assert list((tmp_path / "bundle.build" / "members").iterdir()) == []
    assert main([*common, "--big", str(base), "--small", f"{base}=1", "--precision", "auto"]) == 2
    assert "training begins" in capsys.readouterr().err
    monkeypatch.setattr(building, "try_export", None)
    assert main([*common, "--big", str(base), "--small", f"{base}=1", "--precision", "auto"]) == 2
    shown = capsys.readouterr().err
    assert "try the export: done before" in shown
    assert "training begins" in shown


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_can_be_exported_passes_and_leaves_nothing(
    kind: str | None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    try_export([Start(str(base))], ("a", "b", "c"), pair=True, max_length=64, exits=kind)
    assert list(tmp_path.iterdir()) == []


def test_copies_are_narrow_and_in_full_width_where_that_fails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def export(sources: list[str], *_: object, **__: object) -> None:
        widths.append(json.loads(Path(sources[0], "config.json").read_text("utf-8"))["hidden_size"])
        if len(widths) == 1:
            raise CascadeError("too narrow")

    monkeypatch.setattr("cascade_build.trial.export_bundle", export)
    monkeypatch.setattr("cascade_build.trial._WIDTH", 4)
    try_export([Start(str(base))], ("a", "b"), pair=False, max_length=64)
    whole = json.loads((base / "config.json").read_text("utf-8"))
    assert widths == [4 * whole["num_attention_heads"], whole["hidden_size"]]


def test_members_that_do_not_fit_together_are_found(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="two members are called '3L'"):
        try_export([Start(str(base)), Start(str(base), 1)], ("a", "b"), pair=False, max_length=64)
