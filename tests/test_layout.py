"""The house rules: which way imports run, what an import loads, documented names, causes of errors, plain English."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import cascade_rt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

RANKS = {
    "types": 0,
    "errors": 0,
    "io": 1,
    "bundle": 2,
    "engine": 3,
    "runtime": 4,
    "__init__": 5,  # the public names
    "cluster": 6,
    "tuning": 7,
    "jobs": 7,
    "serving": 7,
    "benchmark": 8,
    "cli": 9,
    "__main__": 10,
}
"""Rooms of cascade_rt: a module imports from its own room and from those of a lower rank."""

OFFLINE = ("cascade_train", "cascade_export", "cascade_build", "torch", "transformers", "onnx", "optimum")
"""Packages that cascade_rt never imports, not even where they are installed."""


def modules(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a file imports, absolute, with its line: in functions and for type checkers too."""
    package = _package(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for name in node.names:
                # `from . import x` may import the module x of the package, or a name of its __init__
                yield (f"{base}.{name.name}" if _is_module(f"{base}.{name.name}") else base), node.lineno


def _package(path: Path) -> list[str]:
    relative = path.relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] == "export" else relative.parts
    return list(parts[:-1])


def _is_module(name: str) -> bool:
    parts = name.split(".")
    return any(
        path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
        for path in ((ROOT / root).joinpath(*parts) for root in (".", "export", "benchmarks"))
    )


def room(module: str) -> str:
    """Return the room of a module of cascade_rt, given with its dots."""
    return module.split(".")[1] if "." in module else "__init__"


def room_of(path: Path) -> str:
    return (
        path.relative_to(ROOT / "cascade_rt").parts[0].removesuffix(".py")
        if path.parent != ROOT / "cascade_rt"
        else path.stem
    )


def wrong_imports(path: Path, ranks: dict[str, int] = RANKS) -> list[str]:
    """Return the imports of a module of cascade_rt that run the wrong way."""
    ours = room_of(path)
    assert ours in ranks, (
        f"the room {ours!r} of {path} has no rank; give it one in RANKS of tests/test_layout.py: above every room that "
        "it imports from, below every room that imports from it"
    )
    wrong = []
    for module, line in imports(path):
        if module.split(".")[0] != "cascade_rt":
            continue
        theirs = room(module)
        assert theirs in ranks, f"{path}:{line}: imports from the room {theirs!r}, which has no rank in RANKS"
        if theirs != ours and ranks[theirs] >= ranks[ours]:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {ours} imports {module}, of a room that is not below it")
    return wrong


@pytest.mark.parametrize("path", modules("cascade_rt"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_the_runtime_run_one_way(path: Path) -> None:
    assert wrong_imports(path) == []


def test_the_direction_is_really_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of an import is seen, and a room without a rank is refused with what to do."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name in ("__init__", "io/__init__", "io/readers", "engine/__init__", "engine/stage", "cli/__init__", "runtime"):
        (tmp_path / "cascade_rt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cascade_rt" / f"{name}.py").touch()
    path = tmp_path / "cascade_rt" / "engine" / "stage.py"
    for line, module in (
        ("from ..runtime import CascadeRuntime", "cascade_rt.runtime"),
        ("from .. import runtime", "cascade_rt.runtime"),
        ("from .. import CascadeRuntime", "cascade_rt"),
        ("import cascade_rt.cli", "cascade_rt.cli"),
        ("import cascade_rt", "cascade_rt"),
        ("from cascade_rt import cli as c", "cascade_rt.cli"),
        ("def f():\n    from ..cli import main", "cascade_rt.cli"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..runtime import x", "cascade_rt.runtime"),
    ):
        path.write_text(line)
        (found,) = wrong_imports(path)
        assert f"engine imports {module}, of a room" in found
    path.write_text("from ..io.readers import x\nfrom . import y\nfrom .stage import z\nimport numpy\n")
    assert wrong_imports(path) == []
    with pytest.raises(AssertionError, match=r"the room 'engine' .* has no rank; give it one in RANKS"):
        wrong_imports(path, {name: rank for name, rank in RANKS.items() if name != "engine"})
    path.write_text("from ..attic.box import x")
    with pytest.raises(AssertionError, match="'attic', which has no rank"):
        wrong_imports(path)


def circle(paths: Iterable[Path]) -> list[str]:
    """Return modules that import each other in a circle, in functions and for type checkers too; empty for none."""
    graph = {_module_name(path): {name for name, _ in imports(path)} - {_module_name(path)} for path in paths}
    try:
        TopologicalSorter({name: found & graph.keys() for name, found in graph.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _module_name(path: Path) -> str:
    if path.parent.name == "benchmarks":  # scripts, which import each other by their names alone
        return path.stem
    return ".".join([*_package(path), path.stem]).removesuffix(".__init__")


def test_no_modules_import_each_other() -> None:
    assert circle(modules("cascade_rt", "export", "benchmarks")) == []


def test_a_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    package = tmp_path / "export" / "house"
    package.mkdir(parents=True)
    for name, line in (("__init__", ""), ("a", "from house.b import x"), ("b", "from . import c"), ("c", "import os")):
        (package / f"{name}.py").write_text(line)
    assert circle(package.glob("*.py")) == []
    (package / "c.py").write_text("def f():\n    from .a import y")
    assert set(circle(package.glob("*.py"))) == {"house.a", "house.b", "house.c"}


MOST_PARAMETERS = 8
MORE_PARAMETERS = {
    "cascade_rt/runtime.py: CascadeRuntime.__init__",
}
"""Functions that may have more."""


def parameters(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every function of a file, with the class or function that it is in, and its number of parameters."""
    where = path.relative_to(ROOT)

    def walk(node: ast.AST, within: str) -> Iterator[tuple[str, int]]:
        for inner in ast.iter_child_nodes(node):
            name = f"{within}{getattr(inner, 'name', 'lambda')}"
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = [part for part in ast.iter_child_nodes(inner.args) if isinstance(part, ast.arg)]
                own = bool(given) and given[0].arg in ("self", "cls")
                yield f"{where}: {name}", len(given) - own
                yield from walk(inner, f"{name}.")
            else:
                yield from walk(inner, f"{name}." if isinstance(inner, ast.ClassDef) else within)

    return walk(ast.parse(path.read_text("utf-8")), "")


def test_functions_have_at_most_eight_parameters() -> None:
    found = {name: count for path in modules("cascade_rt", "export", "benchmarks") for name, count in parameters(path)}
    assert len(found) > 500
    assert {name for name, count in found.items() if count > MOST_PARAMETERS} == MORE_PARAMETERS


def test_every_folder_says_why_it_exists() -> None:
    for path in modules("cascade_rt", "export"):
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path}: says nothing about its folder"


def test_the_runtime_imports_nothing_of_the_offline_stage() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in modules("cascade_rt")
        for name, line in imports(path)
        if name.split(".")[0] in OFFLINE
    ]
    assert wrong == []


def test_the_offline_stage_imports_only_itself_and_the_runtime() -> None:
    """Its packages import those to their left; a command may import any."""
    ours = {path.stem for path in modules("benchmarks")} | {"tests", "benchmarks", "examples", "docs"}
    ranks = {"cascade_train": 0, "cascade_export": 1, "cascade_build": 2}
    wrong = []
    for path in modules("export"):
        package = _package(path)[0]
        for name, line in imports(path):
            top = name.split(".")[0]
            is_command = "cli" in path.with_suffix("").parts
            if top in ours or (ranks.get(top, 0) > ranks[package] and not is_command):
                wrong.append(f"{path}:{line}: {name}")
    assert wrong == []


def test_the_tests_of_the_runtime_need_nothing_of_the_offline_stage() -> None:
    """They run where no torch is installed; onnx, which makes their models, is all that they add."""
    wrong = [
        f"{path}:{line}: {name}"
        for path in [*modules("tests/cascade_rt"), ROOT / "tests" / "toy.py"]
        for name, line in imports(path)
        if name.split(".")[0] in {*OFFLINE} - {"onnx"}
    ]
    assert wrong == []


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    for module in ("cascade_rt", "cascade_rt.cli"):
        heavy = ("matplotlib", "huggingface_hub", "tqdm", *OFFLINE)
        code = f"import sys, {module}\nprint(sorted(set({heavy!r}) & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n", module


def commands() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: dict[str, str] = project["entry-points"]["cascade_rt.commands"]
    return found


def test_there_are_commands_of_the_offline_stage() -> None:
    assert {"analyse", "difficulty", "export", "train"} <= commands().keys()


@pytest.mark.parametrize("name", sorted(commands()))
def test_an_entry_point_is_a_command(name: str) -> None:
    command = import_module(commands()[name])
    assert isinstance(command.SUMMARY, str)
    assert command.SUMMARY
    assert command.EXAMPLE.startswith(f"cascade-rt {name} ")
    assert callable(command.add_arguments)
    assert callable(command.run)
    assert command.__doc__


def documented() -> set[str]:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    assert pages, "docs/reference has no pages"
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)}


def test_every_public_name_is_documented() -> None:
    pages = documented()
    missing = [
        name
        for name in cascade_rt.__all__
        if not name.startswith("__")
        and f"cascade_rt.{name}" not in pages
        and getattr(cascade_rt, name).__module__ not in pages
    ]
    assert missing == [], "of __all__, but on no page of docs/reference"


def test_every_documented_name_exists_and_those_of_the_package_are_public() -> None:
    for name in sorted(documented()):
        package, _, last = name.rpartition(".")
        if _is_module(name):
            import_module(name)
            continue
        assert hasattr(import_module(package), last), name
        if package == "cascade_rt":
            assert last in cascade_rt.__all__


@pytest.mark.parametrize("name", [name for name in cascade_rt.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value: Any = getattr(cascade_rt, name)
    assert value.__doc__
    if inspect.isclass(value):
        assert "__doc__" in vars(value)
        assert not value.__doc__.startswith(f"{name}("), "made by the class, not written"
        for attribute, method in vars(value).items():
            if not attribute.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                assert method.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("path", modules("cascade_rt", "export"), ids=lambda path: str(path.relative_to(ROOT)))
def test_causes_of_errors_are_kept(path: Path) -> None:
    """Never `from None`; and an error that is raised where another was caught names it: `raise ... from error`."""
    wrong = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant) and node.cause.value is None:
            wrong.append(f"{path}:{node.lineno}: from None")
        if isinstance(node, ast.ExceptHandler):
            for inner in (part for line in node.body for part in ast.walk(line)):
                if isinstance(inner, ast.Raise) and inner.exc is not None and inner.cause is None:
                    wrong.append(f"{path}:{inner.lineno}: raises in an except block without `from`")
    assert wrong == []


NAMELESS = {
    "cascade_rt/engine/__init__.py",
    "cascade_rt/engine/exit_rules.py",
    "cascade_rt/engine/inputs.py",
    "cascade_rt/engine/plan.py",
    "cascade_rt/engine/providers.py",
    "cascade_rt/engine/step.py",
    "cascade_rt/engine/task.py",
    "cascade_rt/engine/tokenization.py",
    "cascade_rt/jobs/ray_job.py",
    "cascade_rt/runtime.py",
    "cascade_rt/serving/batcher.py",
    "cascade_rt/serving/body.py",
    "cascade_rt/serving/client.py",
    "cascade_rt/serving/envelope.py",
    "cascade_rt/serving/hugging_face.py",
    "cascade_rt/serving/metrics.py",
    "cascade_rt/serving/ray_serve.py",
    "cascade_rt/serving/server.py",
    "cascade_rt/serving/service.py",
    "cascade_rt/serving/settings.py",
    "cascade_rt/serving/workers.py",
}
"""Files whose docstrings do not all name a thing yet; to be emptied, and then removed."""


def nameless(path: Path) -> list[str]:
    """Return the docstrings, of attributes too, that begin with a question instead of a noun or a verb."""
    return [
        f"{path}:{node.lineno}: {node.value.value.strip()[:60]}"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if re.match(r"(What|How|Whether|Of)\b", node.value.value.strip())
    ]


def test_docstrings_name_a_thing_or_begin_with_a_verb() -> None:
    found = {str(path.relative_to(ROOT)): nameless(path) for path in modules("cascade_rt", "export", "benchmarks")}
    assert [line for name, lines in found.items() if name not in NAMELESS for line in lines] == []


def test_docstrings_that_name_nothing_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('\'\'\'Whatever.\'\'\'\nx = 1\n"""How to."""\ndef f():\n    """Of them."""\n    g("What")\n')
    assert [line.rpartition(": ")[2] for line in nameless(path)] == ["How to.", "Of them."]


PHRASES = [
    "a text's answer is its own",
    "its company changes not one bit",
    "what you can mend",
    "to ask until an answer pleases",
    "pleases voids it",
    "what tells one file from another",
    "that took its place",
    "how many times what is told here",
    "not a folder of yours",
    "that no training saw or chose by",
    "in silence",
    "travel on",
]
"""The left column of the table "Language" of the design, and what it says after the slash."""


def phrases_in(text: str) -> list[str]:
    """Return which of PHRASES a text has, as whole words and wherever its lines break."""
    plain = " ".join(text.split())
    return [phrase for phrase in PHRASES if re.search(rf"\b{re.escape(phrase)}\b", plain, re.IGNORECASE)]


def prose() -> Iterator[tuple[str, str]]:
    """Yield the pages, and the docstrings, messages and comments of the code, with their places."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        yield str(page.relative_to(ROOT)), page.read_text("utf-8")
    for path in modules("cascade_rt", "export", "benchmarks"):
        source = path.read_text("utf-8")
        where = str(path.relative_to(ROOT))
        yield f"{where}, comments", "\n".join(re.findall(r"#(.*)", source))
        tree = ast.parse(source)
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                pieces = [part.value if isinstance(part, ast.Constant) else "x" for part in node.values]
                yield f"{where}:{node.lineno}", "".join(map(str, pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                yield f"{where}:{node.lineno}", node.value


def test_the_phrases_of_the_design_are_gone() -> None:
    read = list(prose())
    assert len(read) > 500
    assert [f"{where}: {phrase}" for where, text in read for phrase in phrases_in(text)] == []


def test_phrases_are_found_as_whole_words_across_lines() -> None:
    assert phrases_in("Within silence it travels on.") == []
    assert phrases_in("it travels\nin\n    silence") == ["in silence"]
    assert phrases_in("Exit status: 0, or 2 for what you can mend.") == ["what you can mend"]


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    in_pyproject = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    in_citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert in_pyproject
    assert in_citation
    in_package = json.loads((ROOT / "js" / "package.json").read_text("utf-8"))["version"]
    assert {in_citation[1], in_package} == {in_pyproject[1]}
