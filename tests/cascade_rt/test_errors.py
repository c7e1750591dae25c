"""Errors: what they carry, that they survive a process boundary, and that the causes are kept."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeRuntime, errors, read_bundle
from cascade_rt.bundle import sha256_of
from cascade_rt.errors import (
    BundleError,
    CascadeError,
    InferenceError,
    InputError,
    InvalidOption,
    MissingExtraError,
    TextError,
    first_line,
)
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.tuning.plot import pyplot
from cascade_rt.tuning.report import Question

from .bundle.manifests import altered, set_to

CLASSES: list[type[CascadeError]] = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, CascadeError)
]
INSTANCES: list[CascadeError] = [
    CascadeError("a message"),
    BundleError("a message"),
    InputError("a message"),
    InvalidOption("max_drop", 2.5, "a share from 0 to below 1"),
    InvalidOption("columns", ["a", "b"], "one name"),
    TextError(7, "found int, expected a text"),
    TextError(7, "found int, expected a text", "in.csv:9"),
    InferenceError("a message"),
    MissingExtraError("reading parquet", "parquet", ImportError("No module named 'pyarrow'", name="pyarrow")),
]


def test_the_drawn_tree_shows_every_class_under_its_base() -> None:
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([ │├└─]*)([A-Z]\w+) {2,}\S", line)
        if found is None:
            continue
        depth = len(found[1])
        above = [(other, name) for other, name in above if other < depth]
        drawn[found[2]] = above[-1][1] if above else None
        above.append((depth, found[2]))
    bases = {kind.__name__: kind.__base__.__name__ for kind in CLASSES if kind is not CascadeError and kind.__base__}
    assert drawn == {"CascadeError": None, **bases}


def test_an_invalid_option_has_its_field_what_was_found_and_what_was_expected() -> None:
    error = InvalidOption("max_drop", 2.5, "a share from 0 to below 1")
    assert (error.field, error.found, error.expected) == ("max_drop", 2.5, "a share from 0 to below 1")
    assert str(error) == "`max_drop`: found 2.5, expected a share from 0 to below 1"
    assert isinstance(error, InputError)
    assert str(InvalidOption("provider", "tpu", "cpu")) == "`provider`: found 'tpu', expected cpu"
    assert str(InvalidOption("thresholds", 1.0, "x")) == "`thresholds`: found 1, expected x"
    assert len(str(InvalidOption("names", ["x" * 99] * 99, "a few"))) < 150, "a long value is cut"


@pytest.mark.parametrize(
    ("call", "field", "found"),
    [
        (lambda bundle: CascadeRuntime(bundle, threads=0), "threads", 0),
        (lambda bundle: CascadeRuntime(bundle, spin_us=-1), "spin_us", -1),
        (lambda bundle: CascadeRuntime(bundle, spin_us=1.5), "spin_us", 1.5),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, threads=True), "threads", True),
        (lambda bundle: CascadeRuntime(bundle, provider="tpu"), "provider", "tpu"),
        (lambda bundle: CascadeRuntime(bundle, provider=None), "provider", None),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, thresholds=2.0), "thresholds", 2.0),
        (lambda bundle: CascadeRuntime(bundle, thresholds="0.5"), "thresholds", "0.5"),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, thresholds=[0.1]), "thresholds", [0.1]),
        (lambda bundle: CascadeRuntime(bundle, members=["huge"]), "members", ["huge"]),
        (lambda bundle: CascadeRuntime(bundle, members=5), "members", 5),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, members=[5]), "members", [5]),  # type: ignore[list-item]
        (lambda bundle: CascadeRuntime(bundle, threads="2"), "threads", "2"),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, threads=1.5), "threads", 1.5),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, preload="no"), "preload", "no"),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, verify=None), "verify", None),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, trace=5), "trace", 5),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle, provider_options="x"), "provider_options", "x"),  # type: ignore[arg-type]
        (lambda _: CascadeRuntime(None), "model_dir", None),  # type: ignore[arg-type]
        (lambda _: CascadeRuntime(""), "model_dir", ""),
        (lambda _: CascadeRuntime(b"bundle"), "model_dir", b"bundle"),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle).predict_iter([], chunk_size=0), "chunk_size", 0),
        (lambda bundle: CascadeRuntime(bundle).predict_iter([], chunk_size=1.5), "chunk_size", 1.5),  # type: ignore[arg-type]
        (lambda bundle: CascadeRuntime(bundle)("a", top_k=0), "top_k", 0),
        (lambda bundle: CascadeRuntime(bundle)("a", batch_size=0), "batch_size", 0),
        (lambda _: Question(max_drop=-0.1), "max_drop", -0.1),
        (lambda _: Question(speedup=0), "speedup", 0),
        (lambda _: Question(budget_ms=0), "budget_ms", 0),
        (lambda _: Question(max_drop=0.1, confidence=1.0), "confidence", 1.0),
        (lambda _: Question(seed=-1), "seed", -1),
        (lambda _: Question(cost="money"), "cost", "money"),
        (lambda _: Reading(format="xml"), "format", "xml"),
        (lambda _: list(read_examples("a.csv", Reading(columns=("a",)), pair=True)), "columns", ["a"]),
    ],
)
def test_every_wrong_parameter_is_named(bundle: Path, call: Callable[[Path], Any], field: str, found: object) -> None:
    with pytest.raises(InvalidOption) as caught:
        call(bundle)
    assert (caught.value.field, caught.value.found) == (field, found)
    assert str(caught.value).startswith(f"`{field}`: found ")


def test_an_invalid_option_is_named_as_the_command_line_spells_it() -> None:
    assert InvalidOption("max_drop", 2, "less").named("--max-drop") == "--max-drop: found 2, expected less"


def test_every_class_has_an_instance_here() -> None:
    assert {type(error) for error in INSTANCES} == set(CLASSES)


@pytest.mark.parametrize("error", INSTANCES)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_errors_survive_pickling(error: CascadeError, protocol: int) -> None:
    """Pools of processes raise a worker's error in the parent."""
    same = pickle.loads(pickle.dumps(error, protocol))
    assert (type(same), str(same)) == (type(error), str(error))
    assert {name: repr(value) for name, value in vars(same).items()} == {
        name: repr(value) for name, value in vars(error).items()
    }


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(RuntimeError("\n one \ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(ValueError("  \n ")) == "ValueError"


def _tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    altered(copied, set_to("tokenizer", "sha256", to=sha256_of(copied / "tokenizer.json")))
    CascadeRuntime(copied)


def _onnx(copied: Path) -> None:
    (copied / "tiny.onnx").write_bytes(b"\xff" * 64)
    altered(copied, set_to("members", 0, "sha256", to=sha256_of(copied / "tiny.onnx")))
    read_bundle(copied)


def _session(copied: Path) -> None:
    content = bytearray((copied / "tiny.onnx").read_bytes())
    at = content.index(b"LayerNormalization")
    content[at : at + 5] = b"Later"  # an operator that nobody knows
    (copied / "tiny.onnx").write_bytes(bytes(content))
    altered(copied, set_to("members", 0, "sha256", to=sha256_of(copied / "tiny.onnx")))
    CascadeRuntime(copied).predict(["a film"])


def _run(copied: Path) -> None:
    runtime = CascadeRuntime(copied)
    ids = np.full((1, 4), 10**6)  # no such word
    runtime.plan.stages[0].run({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})


def _manifest(copied: Path) -> None:
    (copied / "cascade.json").write_text("{")
    read_bundle(copied)


def _read(content: bytes, name: str) -> Callable[[Path], None]:
    def read(copied: Path) -> None:
        (copied / name).write_bytes(content)
        list(read_examples(copied / name, pair=False))

    return read


def _stream(copied: Path) -> None:
    list(CascadeRuntime(copied).predict_iter(["a film"] * 3 + ["half \ud800"], chunk_size=2))


@pytest.mark.parametrize(
    ("fail", "kind", "cause"),
    [
        (_manifest, BundleError, ValueError),
        (_onnx, BundleError, (ValueError, IndexError)),
        (_tokenizer, BundleError, Exception),
        (_session, BundleError, Exception),
        (_run, InferenceError, Exception),
        (_stream, TextError, TextError),
        (lambda copied: CascadeRuntime(copied).predict(["half \ud800"]), TextError, (TypeError, UnicodeEncodeError)),
        (lambda _: CascadeRuntime("hf:team/commands"), BundleError, Exception),
        (_read(b"\xff\xfea", "a.txt"), InputError, UnicodeDecodeError),
        (_read(b'text\n"x\n', "a.csv"), InputError, Exception),
        (_read(b"{\n", "a.jsonl"), InputError, ValueError),
        (lambda _: list(read_examples("gone.txt", pair=False)), InputError, FileNotFoundError),
    ],
)
def test_the_error_of_another_library_is_kept_as_the_cause(
    copied: Path, fail: Callable[[Path], Any], kind: type[CascadeError], cause: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        fail(copied)
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_cannot_be_read_keeps_its_cause(copied: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="not a readable parquet file") as caught:
        _read(b"no parquet", "a.parquet")(copied)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("matplotlib", "plot", lambda _: pyplot()),
        ("pyarrow", "parquet", _read(b"", "a.parquet")),
    ],
)
def test_a_missing_package_names_its_extra_and_keeps_the_cause(
    copied: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, use: Callable[[Path], Any]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'cascade-rt\[{extra}\]'") as caught:
        use(copied)
    assert isinstance(caught.value.__cause__, ImportError)
    assert caught.value.cause is caught.value.__cause__
    assert (caught.value.extra, package in str(caught.value)) == (extra, True)


def test_a_worker_raises_its_error_in_the_parent(bundle: Path) -> None:
    """With its fields, through the pickles of concurrent.futures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(TextError, match="text 1: found int") as text:
            pool.submit(CascadeRuntime(bundle).predict, ["fine", 1]).result()  # type: ignore[list-item]
        assert text.value.index == 1
        with pytest.raises(InvalidOption) as option:
            pool.submit(CascadeRuntime, str(bundle), threads=0).result()
        assert option.value.field == "threads"
        shutil.copytree(bundle, "gone")
        pickled = CascadeRuntime("gone")
        shutil.rmtree("gone")
        with pytest.raises(BundleError, match="no bundle there"):
            pool.submit(pickle.loads, pickle.dumps(pickled)).result()
