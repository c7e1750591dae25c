"""Rules for all commands: options for reading, one value each, and outputs apart from inputs."""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import InputError

from .commands import run
from .test_main import COMMANDS, parser_of

_PATHS = {"FILE", "DIR", "FOLDER", "BUNDLE", "BASE", "BIG", "NAME=DIR"}
_READERS = {
    "predict": "--input", "evaluate": "--input", "tune": "--input", "analyse": "--input", "benchmark": "--data",
    "export": "--check-data", "train": "--train-file", "difficulty": "--train-file", "train-exits": "--train-file",
    "build": "--train-file", "distil": "--texts",
}  # fmt: skip


def option(action: argparse.Action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


def command_line(parser: CommandParser, given: dict[str, str]) -> list[str]:
    """Return a command line with these options, and something for all others that are required."""
    exclusive = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    arguments = []
    for action in parser._actions:
        first_of_group = action in exclusive[:1] and not {other.dest for other in exclusive} & set(given)
        if action.dest in given:
            arguments += [option(action), given[action.dest]]
        elif action.option_strings and (action.required or first_of_group):
            value = (
                next(iter(action.choices)) if action.choices else "1" if action.type is int else f"some-{action.dest}"
            )
            arguments += [option(action), value]
        elif not action.option_strings and action.nargs is None:
            arguments.append("org/name")
    return arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_with_a_path_is_known_as_read_or_written(name: str) -> None:
    parser = parser_of(name)
    named = {action.dest for action in parser._actions if action.metavar in _PATHS}
    assert named == set(parser.inputs) | set(parser.outputs)
    assert {"output", "rejects", "single_file"} & named == set(parser.outputs)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_output_of_a_command_may_be_an_input(tmp_path: Path, name: str) -> None:
    parser = parser_of(name)
    names = parser.option_names()
    pairs = [
        (written, target, read)
        for written, targets in parser.outputs.items()
        for target in targets(Path("place"))
        for read in parser.inputs
    ]
    spellings = cycle(["as it is", "link", "dots", "inside"])
    for at, (written, target, read) in enumerate(pairs):
        folder, spelled = tmp_path / str(at), next(spellings)
        source = folder / target / "input" if spelled == "inside" else folder / target
        source.parent.mkdir(parents=True)
        source.write_text("kept")
        if spelled == "link":
            (folder / "link").symlink_to(source)
            source = folder / "link"
        elif spelled == "dots":
            source = folder / ".." / folder.name / target
        value = f"m={source}" if parser.inputs[read]("m=x") == ["x"] else str(source)
        with pytest.raises(InputError, match=rf"{names[written]} .*{names[read]}\b"):
            parser.parse_args(command_line(parser, {written: str(folder / "place"), read: value}))
    assert bool(pairs) == bool(parser.outputs)
    assert all(file.read_text() == "kept" for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", COMMANDS)
def test_apart_they_are_accepted(tmp_path: Path, name: str) -> None:
    parser = parser_of(name)
    given = {dest: f"m={dest}" if name == "serve" else f"some-{dest}" for dest in parser.inputs if dest != "random"}
    parser.parse_args(command_line(parser, given | {dest: f"some-{dest}" for dest in parser.outputs}))


def test_predict_keeps_its_input(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("a film\n")
    Path("b.txt").symlink_to("a.txt")
    for arguments in (
        ["--output", "b.txt"],
        ["--output", "o.jsonl", "--rejects", "a.txt", "--on-error", "skip"],
        ["--output", "o.jsonl", "--rejects", "o.jsonl", "--on-error", "skip"],
        ["--output", ".", "--engine", "ray"],
        ["--output", f"file://{tmp_path}/a.txt", "--engine", "ray"],
        ["--output", bundle / "cascade.json"],
    ):
        status, found, error = run(capsys, "predict", "--model-dir", bundle, "--input", "a.txt", *arguments)
        assert (status, found, error.count("\n")) == (2, [], 1)
        assert "name" in error
        assert "place" in error
    assert Path("a.txt").read_text() == "a film\n"
    assert not list(tmp_path.glob("o.jsonl*"))


@pytest.mark.parametrize("name", _READERS)
def test_every_command_that_reads_texts_has_the_same_options_for_it(name: str) -> None:
    parser = parser_of(name)
    found = {option(action) for action in parser._actions if action.option_strings}
    labelled = {"--label-column"} - ({"--label-column"} if name in ("predict", "benchmark", "distil") else set())
    pair = {"--pair-column"} - ({"--pair-column"} if name == "distil" else set())
    assert {_READERS[name], "--format", "--text-column", "--encoding", "--delimiter"} | labelled | pair <= found


def test_a_value_given_twice_is_not_chosen_silently(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in {
        "predict": ["--input", "a.txt", "--input", "b.txt"],
        "evaluate": ["--input", "a.txt", "--label-column", "x", "--label-column", "y"],
        "serve": ["--port", "1", "--port", "2"],
        "train": ["--base", "x", "--output", "o", "--epochs", "1.5", "--epochs", "2.5"],
        "distil": ["--base", "x", "--output", "o", "--layers", "1", "--texts", "a", "--texts", "b", "c"],
    }.items():
        bundled = ["--model-dir", str(bundle)] if name in ("predict", "evaluate", "serve") else []
        status, _, error = run(capsys, name, *bundled, *arguments)
        assert status == 2
        first, second = arguments[-4:-2] if name != "distil" else ("--texts", "a"), arguments[-2:]
        assert f"found {first[0]} {first[1]} and {first[0]} " in error
        assert second[-1] in error
        assert "expected it once" in error
    Path("a.txt").write_text("a film\n")
    assert run(capsys, "predict", "--model-dir", bundle, "--input", "a.txt", "--input", "a.txt")[0] == 0


def test_a_pattern_that_the_shell_has_expanded_is_not_taken_for_texts(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt", "c.log"):
        Path(name).write_text("a film\n")
    for command, arguments in (
        ("predict", ["--input", "a.txt", "b.txt", "c.log"]),
        ("evaluate", ["--input", "a.txt", "b.txt"]),
    ):
        status, found, error = run(capsys, command, "--model-dir", bundle, *arguments)
        assert (status, found) == (2, [])
        assert "found a further file, b.txt, where one is expected; put a pattern in quotes" in error
    status, found, error = run(capsys, "predict", "--model-dir", bundle, "a.txt", "b.txt")
    assert (status, found) == (2, [])
    assert "found the name of a file, a.txt, as a text; expected --input a.txt" in error
    for text in ("gone.txt", "x" * 5000, "nul\0", str(tmp_path)):
        assert len(run(capsys, "predict", "--model-dir", bundle, text)[1]) == 1
    assert len(run(capsys, "predict", "--model-dir", bundle, "--input", "*.txt")[1]) == 2


def test_names_with_brackets_are_files_first(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["predict", "--model-dir", bundle, "--input"]
    status, _, error = run(capsys, *predict, "no such [1].csv")
    assert (status, "no such [1].csv: no such file" in error) == (2, True)
    Path("x [1].csv").write_text("text\nin brackets\n")
    Path("x 1.csv").write_text("text\nwithout\n")
    assert [line["text"] for line in run(capsys, *predict, "x [1].csv")[1]] == ["in brackets"]
    Path("folder.txt").mkdir()
    Path("folder.txt/a.txt").write_text("in a folder\n")
    assert len(run(capsys, *predict, "*.txt/*")[1]) == 1


def test_predict_goes_on_after_a_stray_quote_and_counts_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv").write_text('text;label\nfirst;pos\n"not closed;pos\n' + "again;neg\n" * 50)
    command: list[Any] = ["predict", "--model-dir", bundle, "--input", "a.csv", "--output", "out.jsonl"]
    status, _, error = run(capsys, *command)
    assert (status, "a.csv:3: malformed CSV: a quote opens in this line and is not closed" in error) == (2, True)
    status, _, error = run(capsys, *command, "--resume")
    assert status == 2
    for path in Path().glob("out.jsonl*"):
        path.unlink()
    status, _, error = run(capsys, *command, "--on-error", "skip", "--rejects", "rejects.jsonl")
    assert (status, "1 of 52 rows were rejected" in error) == (0, True)
    assert len(Path("out.jsonl").read_text().splitlines()) == 51
    assert json.loads(Path("rejects.jsonl").read_text())["row"] == '"not closed;pos'
    assert run(capsys, *command[:-2], "--delimiter", "semicolon", "--on-error", "skip")[0] == 0
    status, _, error = run(capsys, *command[:-2], "--delimiter", ",")
    assert (status, "found the columns 'text;label'" in error) == (2, True)
