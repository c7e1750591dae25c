"""The front door: help, versions, typos, and mistakes that cost one line and no traceback."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import cascade_rt
from cascade_rt import cli
from cascade_rt.benchmark.workload import Workload
from cascade_rt.cli import BUILT_IN, GROUP, main
from cascade_rt.cli.parser import Command, CommandParser
from cascade_rt.engine.execution import Execution
from cascade_rt.io.readers import Reading
from cascade_rt.serving.settings import Scaling, Settings
from cascade_rt.tuning.report import Question

from .commands import run

ROOT = Path(__file__).parents[3]
COMMANDS = [*BUILT_IN, *sorted(point.name for point in entry_points(group=GROUP))]


def parser_of(name: str) -> CommandParser:
    command: Command = (
        import_module(f"cascade_rt.cli.{name}")
        if name in BUILT_IN
        else next(point.load() for point in entry_points(group=GROUP) if point.name == name)
    )
    return CommandParser(name, command)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_summary_and_an_example_of_every_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    for name in COMMANDS:
        (at,) = [index for index, line in enumerate(lines) if re.match(rf"  {name} +\S", line)]
        assert lines[at + 1].strip().startswith(f"cascade-rt {name}"), "its example follows"
    assert sum(line.strip().startswith("cascade-rt ") for line in lines[1:-1]) == len(COMMANDS)
    assert {"predict", "info", "evaluate", "tune", "benchmark", "push", "train", "export"} <= set(COMMANDS)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["predict", "--help"], ["train", "--help"], ["export", "--help"]):
        try:
            status: Any = main(arguments)
        except SystemExit as stop:  # argparse ends so, for the help of one command
            status = stop.code
        assert status == 0
        assert "cascade-rt" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"cascade-rt {cascade_rt.__version__}\n"


def test_the_front_door_as_a_process() -> None:
    command = [sys.executable, "-m", "cascade_rt"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cascade-rt predict --model-dir" in shown.stdout
    assert shown.stderr == ""
    wrong = subprocess.run([*command, "predcit"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "cascade-rt: error: found no command 'predcit'; did you mean predict?\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("predcit", "predict"), ("Predict", "predict"), ("evalaute", "evaluate"), ("benchmarks", "benchmark"),
        ("tunes", "tune"), ("infos", "info"), ("trian", "train"), ("exprot", "export"), ("analyze", "analyse"),
    ],
)  # fmt: skip
def test_a_typo_suggests_the_nearest_command(capsys: pytest.CaptureFixture[str], typed: str, meant: str) -> None:
    status, _, error = run(capsys, typed, "--model-dir", "x")
    assert (status, error) == (2, f"cascade-rt: error: found no command '{typed}'; did you mean {meant}?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_defaults_that_say_something(name: str) -> None:
    shown = parser_of(name).format_help()
    for empty in ("None", "[]", "False", "True", "{}", "()", ""):
        assert f"(default: {empty})" not in shown
    assert not re.search(r"default: [\[(]", shown), "values, not a list of them"
    assert " ".join(shown.split()).count("example: cascade-rt " + name) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_explained(name: str) -> None:
    unexplained = [action.dest for action in parser_of(name)._actions if not action.help]
    assert unexplained == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "doctor"])  # which needs none
def test_a_command_without_arguments_is_one_clear_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, _, error = run(capsys, name)
    assert (status, error.count("\n")) == (2, 1)
    assert re.match(
        rf"cascade-rt: error: .* \(see: cascade-rt {name} --help\)$|cascade-rt: error: found no text", error
    )


@pytest.mark.parametrize(
    "arguments", ["train --base x --task smart-home --output out", "export --member x --output out"]
)
def test_a_command_whose_packages_are_missing_names_the_extra(arguments: str) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in {'torch', 'transformers', 'optimum'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from cascade_rt.cli import main\n"
        f"sys.exit(main({arguments.split()}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'cascade-rt[export]'" in done.stderr


def test_a_command_of_another_distribution_that_cannot_be_imported_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("brew", "a_package_that_is_not_there.brew", GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [broken])
    assert main(["--help"]) == 0
    assert "cascade-rt predict" in capsys.readouterr().out, "the others still work"
    status, _, error = run(capsys, "brew")
    assert (status, error.count("\n")) == (2, 1)
    assert "a_package_that_is_not_there" in error


def test_a_command_of_another_distribution_is_found_and_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "brewing.py").write_text(
        'SUMMARY = "make coffee"\nEXAMPLE = "cascade-rt brew --cups 2"\n'
        'def add_arguments(parser):\n    parser.add_argument("--cups", type=int, default=1, help="how many")\n'
        'def run(options):\n    print("cups:", options.cups)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("brew", "brewing", group)])
    assert main(["brew", "--cups", "3"]) == 0
    assert capsys.readouterr().out == "cups: 3\n"
    assert main([]) == 0
    assert "make coffee" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("predict --model-dir nowhere text", "nowhere: no bundle there"),
        ("predict --model-dir BUNDLE", "no text"),
        ("predict --model-dir BUNDLE text --input -", "found texts and --input, expected one of them"),
        ("predict --model-dir BUNDLE --threshold 1.5 text", "--threshold: found 1.5, expected a number from 0 to 1"),
        ("predict --model-dir BUNDLE --threshold high text", "invalid float value: 'high'"),
        ("predict --model-dir BUNDLE --input gone.csv", "gone.csv: no such file"),
        ("predict --model-dir BUNDLE --input gone/", "gone/: no such file; check the path"),
        ("predict --model-dir BUNDLE --input pairs.csv --text-column a --pair-column b", "texts here are single"),
        ("predict --model-dir BUNDLE --input pairs.csv --text-column c", "no column 'c'; found 'a', 'b'"),
        ("predict --model-dir BUNDLE --input pairs.csv --pair-column b", "requires --text-column"),
        ("predict --model-dir BUNDLE --input two.jsonl", "found pairs ('text' and 'text_pair'), expected single texts"),
        ("predict --model-dir BUNDLE --input two.txt", "two.txt:1: found a pair"),
        ("evaluate --model-dir BUNDLE --input many.csv", "many.csv:1032: found the label 'bogus'"),
        (
            "predict --model-dir BUNDLE --threads 99999999999 text",
            "--threads: found 99999999999, expected a whole number from 1 to 1024",
        ),
        ("predict --model-dir PAIRS --input single.txt", "expected a pair"),
        ("predict --model-dir PAIRS --input labelled.csv", "expected a pair"),
        ("predict --model-dir BUNDLE --input latin.txt", "expected UTF-8"),
        ("predict --model-dir BUNDLE --output no/out text", "does not exist; create it first"),
        ("predict --model-dir BUNDLE --output . text", "it is a folder"),
        (
            "predict --model-dir BUNDLE --provider cuda text",
            "--provider: found 'cuda', expected one that is available: ",
        ),
        (
            "evaluate --model-dir BUNDLE --input labelled.csv",
            "found the label 'splendid', expected one that the bundle",
        ),
        ("evaluate --model-dir BUNDLE --input single.txt", "no column 'label'"),
        ("evaluate --model-dir BUNDLE --input labelled.csv --label-column y", "no column 'y'; found 'text', 'label'"),
        ("evaluate --model-dir BUNDLE --input empty.csv", "found no examples"),
        ("info", "--model-dir"),
        ("brew", "found no command 'brew'; expected one of: predict, serve, info"),
        ("predict --model-dir BUNDLE --format xml --input two.txt", "--format: invalid choice: 'xml'"),
        ("predict --model-dir BUNDLE --provider-option device_id text", "expected KEY=VALUE"),
        ("predict --model-dir BUNDLE --modeldir x text", "unrecognized arguments: --modeldir"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(
    capsys: pytest.CaptureFixture[str], bundle: Path, pair_bundle: Path, tmp_path: Path, arguments: str, says: str
) -> None:
    (tmp_path / "pairs.csv").write_text("a,b\nx,y\n")
    (tmp_path / "single.txt").write_text("one text\n")
    (tmp_path / "labelled.csv").write_text("text,label\nx,splendid\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "two.jsonl").write_text('{"text": "a", "text_pair": "b"}\n')
    (tmp_path / "two.txt").write_text("a\tb\n")
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n' * 1030 + '{"text": "\\ud83d"}\n')
    (tmp_path / "many.csv").write_text("text,label\n" + "x,good\n" * 1030 + "x,bogus\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    places = {"BUNDLE": str(bundle), "PAIRS": str(pair_bundle)}
    before = sorted(path.name for path in tmp_path.iterdir())
    status, lines, error = run(capsys, *(places.get(word, word) for word in arguments.split()))
    assert (status, lines, error.count("\n")) == (2, [], 1)
    assert error.startswith("cascade-rt: error: ")
    assert says in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        ("predict --model-dir BUNDLE --threads 0 text", "--threads", "found 0, expected a whole number from 1 to 1024"),
        ("predict --model-dir BUNDLE --threshold -1 text", "--threshold", "found -1, expected a number from 0 to 1"),
        ("predict --model-dir BUNDLE --threshold nan text", "--threshold", "found nan, expected a number from 0 to 1"),
        ("predict --model-dir BUNDLE --provider tpu text", "--provider", "found 'tpu', expected one that is available"),
        (
            "predict --model-dir BUNDLE --input two.csv --text-column a --pair-column b",
            "--text-column",
            "found ['a', 'b'], expected one name",
        ),
        (
            "predict --model-dir PAIRS --input two.csv --text-column a",
            "--text-column",
            "found ['a'], expected two names",
        ),
        ("predict --model-dir BUNDLE --input a.pdf", "format", "or the name of its format"),
        (
            "predict --model-dir BUNDLE --pool big=1 text",
            "--pool",
            "found ['big=1'], expected none without --engine ray",
        ),
        ("predict --model-dir BUNDLE --actors 0 text", "--actors", "found 0, expected none without --engine ray"),
        ("predict --model-dir BUNDLE --engine ray text", "--engine", "requires --input with files and --output with a"),
        (
            "predict --model-dir BUNDLE --engine ray --input two.csv --output out --pool big",
            "--pool",
            "found --pool big, expected MEMBER=ACTORS[:PROVIDER], each member once",
        ),
        (
            "predict --model-dir BUNDLE --engine ray --input two.csv --output out --pool big=1 --actors 2",
            "--pool",
            "found --actors and --pool, expected one of them",
        ),
        ("evaluate --model-dir BUNDLE --input two.csv --threads 0", "--threads", "found 0"),
        ("evaluate --model-dir BUNDLE --input two.csv --threshold 2", "--threshold", "found 2"),
        ("tune --model-dir BUNDLE --input two.csv --threads 0", "--threads", "found 0"),
        ("tune --model-dir BUNDLE --input two.csv --provider tpu", "--provider", "found 'tpu'"),
        (
            "tune --model-dir BUNDLE --input two.csv --max-drop 1",
            "--max-drop",
            "found 1, expected a share from 0 to below",
        ),
        ("tune --model-dir BUNDLE --input two.csv --speedup -2", "--speedup", "found -2, expected a number above 0"),
        ("tune --model-dir BUNDLE --input two.csv --budget-ms 0", "--budget-ms", "found 0, expected a number above 0"),
        (
            "tune --model-dir BUNDLE --input two.csv --max-drop 0 --confidence 0.4",
            "--confidence",
            "found 0.4, expected a number from 0.5 to below 1",
        ),
        ("tune --model-dir BUNDLE --input two.csv --seed -1", "--seed", "found -1, expected a whole number from 0"),
        (
            "tune --model-dir BUNDLE --input two.csv --confidence 0.9",
            "--confidence",
            "found 0.9, expected a maximum drop with it",
        ),
        ("tune --model-dir BUNDLE --input two.csv --p95", "--p95", "found True, expected a budget in ms with it"),
        (
            "tune --model-dir BUNDLE --input two.csv --max-drop 0 --budget-ms 1",
            "--budget-ms",
            "found 1, expected one objective: a maximum drop, a speed-up or a budget",
        ),
        ("tune --model-dir org/name --input two.csv --max-drop 0", "tune", "tune a copy, or make it a dry run"),
        ("tune --model-dir BUNDLE --input one.jsonl", "agreement", "or measure agreement with the last member"),
        ("benchmark --model-dir BUNDLE --threads 0", "--threads", "found 0"),
        ("benchmark --model-dir BUNDLE --provider tpu", "--provider", "found 'tpu'"),
        ("benchmark --model-dir BUNDLE --speedup 0", "--speedup", "found 0, expected a number above 0"),
        ("benchmark --model-dir BUNDLE --words many", "--words", "found 'many', expected MEAN:SD"),
        ("benchmark --model-dir BUNDLE --words 0:0", "--words", "found '0:0', expected MEAN:SD"),
        ("benchmark --model-dir BUNDLE --texts 0", "--texts", "found 0, expected"),
        ("benchmark --model-dir BUNDLE --rounds 0", "--rounds", "found 0, expected"),
        ("benchmark --model-dir BUNDLE --batch-size 0", "--batch-size", "expected"),
        ("push --model-dir BUNDLE no-slash", "ORG/NAME", "found 'no-slash', expected org/name"),
    ],
)
def test_the_command_line_names_options_where_the_library_names_parameters(
    capsys: pytest.CaptureFixture[str], bundle: Path, pair_bundle: Path, arguments: str, option: str, says: str
) -> None:
    Path("two.csv").write_text("a,b\nx,y\n")
    Path("a.pdf").touch()
    Path("one.jsonl").write_text('{"text": "a film", "label": "good"}\n' * 60)
    places = {"BUNDLE": str(bundle), "PAIRS": str(pair_bundle)}
    status, _, error = run(capsys, *(places.get(word, word) for word in arguments.split()))
    assert (status, error.count("\n")) == (2, 1)
    assert option in error
    assert says in error
    assert not re.search(r"`\w+`", error), "no name of the library is left"
    assert all(name in parser_of(arguments.split(maxsplit=1)[0]).format_help() for name in option.split(" and "))


def test_output_is_utf8_whatever_the_terminal(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    (tmp_path / "in.jsonl").write_text('{"text": "a film", "note": "schön 🙂"}', "utf-8")
    assert main(["predict", "--model-dir", str(bundle), "--input", "in.jsonl"]) == 0
    stream.flush()
    assert "schön 🙂" in written.getvalue().decode("utf-8")


@pytest.mark.parametrize(
    ("kind", "command", "others"),
    [
        (Question, "tune", set()),
        (Workload, "benchmark", {"reading"}),
        (Reading, "evaluate", {"columns", "skip_malformed"}),
        (Execution, "predict", {"spin_us", "packed"}),
        (Settings, "serve", {"execution", "max_body"}),
        (Scaling, "serve", set()),
    ],
)
def test_every_field_has_an_option(kind: type, command: str, others: set[str]) -> None:
    """A field without one would have its default, whatever the command line says."""
    names = set(signature(kind).parameters)
    assert names - {action.dest for action in parser_of(command)._actions} == others
