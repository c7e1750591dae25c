"""Standard streams that are closed, full or gone, and locales without UTF-8: an answer, or one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cascade_rt import cli
from cascade_rt.cli import main

from .commands import run

pytestmark = pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs the files of a POSIX system")
COMMAND = [sys.executable, "-m", "cascade_rt"]


def started(arguments: list[Any], redirected: str = "", **environment: str) -> tuple[int, bytes, str]:
    """Run a command in a shell with redirections; return its status, standard output and standard error."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {redirected}', "sh", *COMMAND, *arguments],
        capture_output=True,
        env={**kept, **environment},
        cwd=Path(cli.__file__).parents[2],
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_descriptors_that_are_closed_are_opened_so_that_no_file_gets_them(bundle: Path, tmp_path: Path) -> None:
    texts, output = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    texts.write_text("a film\nso sad\n")
    arguments = ["predict", "--model-dir", bundle, "--input", texts, "--output", output]
    assert started(arguments, "<&- >&- 2>&-") == (0, b"", "")
    assert [json.loads(line)["exit"] in (0, 1, 2) for line in output.read_text().splitlines()] == [True, True]


def test_a_closed_standard_input_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    status, answers, error = run(capsys, "predict", "--model-dir", bundle, "--input", "-")
    assert (status, answers, error.count("\n")) == (2, [], 1)
    assert "it is closed; redirect it from a file" in error
    assert run(capsys, "predict", "--model-dir", bundle, "a film")[0] == 0, "nothing is read"
    assert sys.stdin is None


@pytest.mark.parametrize(
    ("arguments", "opens"),
    [("--version", False), ("--help", False), ("info --help", False), ("predict film", True), ("info --json", True)],
)
def test_a_closed_standard_output_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, opens: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*arguments.split(), *(["--model-dir", str(bundle)] if opens else [])]) == 2
    error = capsys.readouterr().err
    assert error == ("cascade-rt: error: standard output: it is closed; redirect it to a file, or to /dev/null\n")


def test_rejects_for_a_closed_standard_output_are_not_lost_silently(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('broken\n{"text": "a film"}\n')
    command = ["predict", "--model-dir", str(bundle), "--input", "in.jsonl", "--output", "out.jsonl"]
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*command, "--on-error", "skip", "--rejects", "-"]) == 2
    assert "standard output: it is closed" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_a_command_that_writes_files_needs_no_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ModuleType("write")
    code = (
        "import pathlib\nSUMMARY = EXAMPLE = 'cascade-rt write'\n"
        "def add_arguments(parser):\n    parser.add_argument('--output')\n    parser.writes('output')\n"
        "def run(options):\n    print('x' * 100000, flush=True)\n    pathlib.Path(options.output).write_text('done')\n"
    )
    exec(code, command.__dict__)
    monkeypatch.setattr(cli, "find_command", lambda _: command)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["write", "--output", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made").read_text() == "done"
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_mapped_for_lack_of_memory_is_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", full)
    assert main(["predict", "--model-dir", str(bundle), "good"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cascade-rt: error: ")
    assert "out of memory" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device on this system")
@pytest.mark.parametrize("arguments", [["--version"], ["predict", "--help"]])
def test_a_full_standard_output_is_one_line(arguments: list[str]) -> None:
    status, _, error = started(arguments, "> /dev/full")
    assert (status, error) == (2, "cascade-rt: error: standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device on this system")
def test_progress_that_cannot_be_written_ends_no_work(bundle: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a film\n")
    status, answers, _ = started(["predict", "--model-dir", bundle, "--input", texts], "2> /dev/full")
    assert (status, answers.count(b"\n")) == (0, 1)


def test_arguments_and_names_are_utf_8_in_a_locale_that_is_not(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "für").mkdir()
    texts = tmp_path / "für" / "tëxts.txt"
    texts.write_text("a film\n", encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    status, answers, error = started(["predict", "--model-dir", bundle, "a très lovely film"], **plain)
    assert (status, error) == (0, "")
    assert [json.loads(answers)] == run(capsys, "predict", "--model-dir", bundle, "a très lovely film")[1]
    output = tmp_path / "für" / "änswers.jsonl"
    status, _, error = started(["predict", "--model-dir", bundle, "--input", texts, "--output", output], **plain)
    assert (status, output.exists()) == (0, True), error


def test_an_argument_that_is_not_utf_8_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    status, _, error = run(capsys, "predict", "--model-dir", bundle, text)
    assert (status, error.count("\n")) == (2, 1)
    assert "text 0: found a byte that is not UTF-8 (0xe9), or half a surrogate pair, at character 3" in error


def test_a_working_directory_that_is_gone_is_named(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        status, _, error = run(capsys, "predict", "--model-dir", bundle, "a film", "--output", "x.jsonl")
        assert (status, error) == (2, "cascade-rt: error: the working directory: No such file or directory\n")
        assert run(capsys, "predict", "--model-dir", bundle, "a film")[0] == 0
    finally:
        os.chdir(tmp_path)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("can't start new thread"), "raise the limit of processes and threads (ulimit -u), or end some"),
        (RuntimeError("Could not determine home directory."), "HOME, to a folder that can be written, and USER"),
        (KeyError("getpwuid(): uid not found: 54321"), "HOME, to a folder that can be written, and USER"),
    ],
)
@pytest.mark.parametrize("name", ["predict", "info", "push"])
def test_an_environment_that_lacks_something_is_one_line(
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    remedy: str,
) -> None:
    def fail(_: Any) -> None:
        raise error

    command = cli.find_command(name)
    monkeypatch.setattr(command, "run", fail)
    given = {"predict": ["a"], "info": [], "push": ["org/name"]}[name]
    status, _, shown = run(capsys, name, "--model-dir", bundle, *given)
    assert (status, shown.count("\n")) == (2, 1)
    assert remedy in shown
