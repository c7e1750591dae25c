"""Messages name what a user can do: parameters that are options of the command, commands, options and extras."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from cascade_rt.cli import BUILT_IN, find_command
from cascade_rt.cli.parser import CommandParser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OFFLINE: dict[str, str] = PROJECT["entry-points"]["cascade_rt.commands"]

READS = "analyse benchmark build difficulty distil evaluate export predict train train-dan train-exits tune"
"""Commands that read a file of texts."""
RUNS = "benchmark evaluate predict serve tune"
"""Commands with options for where members run."""
TRAINS = "build difficulty train train-dan train-exits"
"""Commands that fine-tune on labelled texts."""

LABELLED = f"analyse evaluate export tune {TRAINS}"
SHOWN_BY = {
    "actors": "predict",
    "aggregate": "evaluate predict serve tune",
    "augment": "build train-dan",
    "buckets": "train-dan",
    "budget_ms": "tune",
    "calibrate": "export",
    "choose_cuts": "export",
    "columns": READS,
    "confidence": "build tune",
    "cost": "build tune",
    "count": "benchmark",
    "dan_epochs": "build",
    "delimiter": READS,
    "encoding": READS,
    "every": "train-exits",
    "exit_rule": "export",
    "exporter": "export",
    "folds": "difficulty",
    "format": READS,
    "grpc_port": "serve",
    "holdout": TRAINS,
    "jobs": "difficulty",
    "kind": "train-exits",
    "label_columns": LABELLED,
    "label_separator": LABELLED,
    "layers": "difficulty distil train",
    "max_accuracy_drop": "build export",
    "most_cut_differently": "export",
    "max_drop": "build tune",
    "max_length": "build difficulty distil export train train-dan train-exits",
    "max_replicas": "serve",
    "max_wait_ms": "serve",
    "min_replicas": "serve",
    "on_error": "predict",
    "p95": "tune",
    "patience": "evaluate predict train-dan",
    "patient": "train",
    "pools": "predict",
    "port": "serve",
    "precision": "build export",
    "provider": f"export {RUNS}",
    "provider_options": f"export {RUNS}",
    "random": "export",
    "reload_seconds": "serve",
    "repository": "push",
    "reserve": "build",
    "root_path": "serve",
    "shard_format": "predict",
    "shard_rows": "predict",
    "small": "build",
    "speedup": "benchmark build tune",
    "split_seed": TRAINS,
    "stride": "evaluate predict serve tune",
    "target_requests": "serve",
    "task": TRAINS,
    "threads": RUNS,
    "threshold": "export",
    "thresholds": "analyse evaluate predict",
    "timeout": "serve",
    "tokenizer": "build difficulty train train-dan",
    "unigrams": "train-dan",
    "words": "benchmark",
    "workers": "serve",
}
"""Parameters that `InvalidOption` names -> the commands that may print them."""

REMEDIES = {
    "address": ("address", "predict serve"),
    "agreement": ("agreement", "tune"),
    "another encoding": ("encoding", READS),
    "another precision": ("precision", "build export"),
    "calibration": ("calibrate", "export"),
    "check data": ("check_data", "export"),
    "column of the labels": ("label_column", TRAINS),
    "delimiter": ("delimiter", READS),
    "dry run": ("dry_run", "tune"),
    "holdout": ("holdout", TRAINS),
    "its column": ("columns", READS),
    "larger drop": ("max_accuracy_drop", "build export"),
    "larger reserve": ("reserve", "build"),
    "module replacing": ("module_replacing", "train"),
    "overwrite": ("overwrite", "build export pack"),
    "relations": ("relations", "distil"),
    "resume": ("resume", "predict"),
    "set one for all": ("max_length", "build export"),
    "split seed": ("split_seed", TRAINS),
    "their folder as the data": ("data", TRAINS),
    "the format": ("format", READS),
}
"""Words of messages for what to do -> the parameter that does it, and the commands that may print them."""

OF_PYTHON_ALONE = {"chunk_size", "members", "rule", "spin_us"}
"""Parameters of the library that no command passes on."""


def modules() -> list[Path]:
    return [path for folder in ("cascade_rt", "export") for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def messages() -> list[tuple[str, str]]:
    """Return the strings of the code that are no docstrings, with their places; values in f-strings are {}."""
    found = []
    for path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        apart = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                apart |= {id(part) for part in node.values}
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
                found.append((where, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
                found.append((where, node.value))
    return found


def fields() -> Iterator[tuple[str, str]]:
    """Yield the parameters that errors name, with their places."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "InvalidOption":
                field = node.args[0]
                if isinstance(field, ast.Constant):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", str(field.value)


@cache
def parser(command: str) -> CommandParser:
    return CommandParser(command, find_command(command))


def options(command: str) -> set[str]:
    return {option for action in parser(command)._actions for option in action.option_strings}


COMMANDS = sorted({*BUILT_IN, *OFFLINE})


def test_only_an_invalid_option_names_its_parameter() -> None:
    """The command line replaces that name; others would reach the user as they are."""
    assert [(where, text) for where, text in messages() if re.search(r"`\w+`", text)] == []


def test_what_a_message_says_to_do_is_possible_in_each_command_that_may_print_it() -> None:
    texts = [text for _, text in messages()]
    for words, (name, commands) in REMEDIES.items():
        assert any(words in text for text in texts), f"no message says {words!r}"
        for command in commands.split():
            assert name in parser(command).option_names(), f"{words!r} of cascade-rt {command}"


def test_every_parameter_in_a_message_is_listed() -> None:
    """A new one belongs into SHOWN_BY, with the commands that may print it."""
    unlisted = [f"{where}: `{name}`" for where, name in fields() if name not in SHOWN_BY.keys() | OF_PYTHON_ALONE]
    assert unlisted == []
    assert (SHOWN_BY.keys() | OF_PYTHON_ALONE) - {name for _, name in fields()} == DYNAMIC


DYNAMIC = {"max_drop", "max_wait_ms", "port", "reload_seconds"}
"""Listed parameters whose names are put together where they are raised."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_is_an_option_of_each_command_that_may_print_it(command: str) -> None:
    names = parser(command).option_names()
    missing = [name for name, commands in SHOWN_BY.items() if command in commands.split() and name not in names]
    assert missing == [], f"cascade-rt {command} has no option for them, and no alias"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_alias_names_options_of_its_command(command: str) -> None:
    for name, spelled in parser(command).aliases.items():
        named = set(re.findall(r"--[\w-]+", spelled))
        assert named, f"{name} of {command}: {spelled}"
        assert named <= options(command), f"{name} of {command}: {spelled}"


def test_commands_and_their_options_exist_wherever_a_message_names_them() -> None:
    wrong = []
    for where, text in messages():
        for command, given in re.findall(r"cascade-rt ([a-z][a-z-]*)((?: --[\w-]+)*)", text):
            if command in COMMANDS:
                wrong += [f"{where}: {command} {option}" for option in given.split() if option not in options(command)]
            elif given:  # without options, it is a word behind the name of the package
                wrong.append(f"{where}: cascade-rt {command}")
    assert wrong == []


def test_the_errors_of_the_library_name_no_options() -> None:
    """They name parameters, which the command line spells; or a whole command with its options."""
    found = set()
    for path in modules():
        if "cli" in path.parts or path.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for part in ast.walk(node) if isinstance(node, ast.Raise) else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    alone = re.findall(r"--[a-z][\w-]+", _without_commands(part.value))
                    found |= {(path.name, option) for option in alone}
    expected = {("server.py", "--traces"), ("server.py", "--grpc-port"), ("service.py", "--allow-thresholds")}
    assert found == expected, "about the server's own command"


def _without_commands(text: str) -> str:
    return re.sub(r"cascade-rt [\w-]+(?: --[\w-]+(?: [^-]\S*)?)+", "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_its_own_options(command: str) -> None:
    module = import_module(OFFLINE.get(command, f"cascade_rt.cli.{command}"))
    path = Path(str(module.__file__)).relative_to(ROOT).as_posix()
    for where, text in messages():
        if where.startswith(f"{path}:"):
            assert set(re.findall(r"--[a-z][\w-]+", _without_commands(text))) <= options(command), where


def test_every_extra_exists() -> None:
    extras = PROJECT["optional-dependencies"].keys()
    for where, text in messages():
        for extra in re.findall(r"(?:cascade-rt\[|\(extra: )([\w,]+)[\])]", text):
            assert extra in extras, where
    named = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError":
                assert isinstance(node.args[1], ast.Constant)
                named.add(node.args[1].value)
    assert {"export", "ray", "serve"} <= named <= extras
