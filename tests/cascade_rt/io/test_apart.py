"""An output is never an input, however it is spelled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade_rt.errors import InputError
from cascade_rt.io.apart import check_apart


@pytest.fixture(autouse=True)
def places(tmp_path: Path) -> None:
    """Make files and folders, and links to them."""
    for folder in ("data/deep", "members/2L", "elsewhere"):
        Path(folder).mkdir(parents=True)
    for file in ("a.txt", "data/b.txt", "data/deep/c.txt", "members/2L/model.onnx", "elsewhere/d.txt", "x [1].txt"):
        Path(file).write_text("a text\n")
    Path("link.txt").symlink_to("a.txt")
    Path("to-data").symlink_to("data")
    Path("data/of-d.txt").symlink_to("../elsewhere/d.txt")
    os.link("a.txt", "hard.txt")
    os.link("data/b.txt", "hard-b.txt")
    Path("out").mkdir()


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("a.txt", "a.txt"), ("a.txt", "./a.txt"), ("a.txt", "data/../a.txt"), ("a.txt", "to-data/../a.txt"),
        ("link.txt", "a.txt"), ("a.txt", "link.txt"), ("hard.txt", "a.txt"), ("a.txt", "hard.txt"),
        ("data/b.txt", "to-data/b.txt"), ("x [1].txt", "x [1].txt"),
        # inside, or around
        ("data", "data/new.jsonl"), ("data", "to-data/new.jsonl"), ("to-data", "data/deep/new.jsonl"),
        ("data/", "data"), ("members/2L", "members"), ("members/2L", "members/2L/"), ("members", "members/2L/new"),
        ("elsewhere/d.txt", "elsewhere"), (".", "new.jsonl"), (".", "new/deep/er.jsonl"),
        # what a folder or a pattern has
        ("data", "hard-b.txt"), ("data", "elsewhere/d.txt"), ("data/*.txt", "data/new.txt"), ("data/*.txt", "data"),
        ("to-data/*.txt", "data/new.txt"), ("data/*.txt", "hard-b.txt"), ("**/*.txt", "data/deep/new.txt"),
        ("data/n?w.txt", "data/new.txt"), ("members", "members/2L/model.onnx"),
        # URIs
        ("s3://b/texts", "s3://b/texts/"), ("s3://b/texts", "s3://b/texts/out"), ("s3://b/t/*.csv", "s3://b/t/o.csv"),
        ("s3://b/texts/a.csv", "s3://b/texts"), ("s3://b/a%20b", "s3://b/a b"),
    ],
)  # fmt: skip
def test_an_output_that_is_in_or_around_an_input_is_refused(source: str, output: str) -> None:
    for spelled in (source, str(Path(source).absolute()), f"file://{Path(source).absolute()}"):
        if spelled != source and ("://" in source or "?" in source):
            continue  # a question mark begins the URI's query
        with pytest.raises(InputError, match=r"--output .*--input"):
            check_apart({"--input": [spelled]}, {"--output": [output]})


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("a.txt", "b.txt"), ("a.txt", "a.txt.jsonl"), ("a.txt", "out/a.txt"), ("data", "data2"), ("data", "out/new"),
        ("data/*.txt", "data/new.jsonl"), ("data/*.txt", "out/new.txt"), ("a.txt", "-"), ("-", "a.txt"),
        ("a.txt", "/dev/null"),
        ("hf:org/name", "hf:org/name"), ("s3://b/texts", "s3://b/text"), ("s3://b/texts", "s3://c/texts"),
        ("gone/*.txt", "a.txt"), ("members/2L", "members/3L"), ("/dev/null", "/dev/null"),
    ],
)  # fmt: skip
def test_others_are_not(source: str, output: str) -> None:
    check_apart({"--input": [source]}, {"--output": [output]})


@pytest.mark.parametrize(
    ("one", "other"), [("o.txt", "o.txt"), ("o.txt", "O.TXT"), ("o", "o/file"), ("a.txt", "hard.txt"), ("-", "-")]
)
def test_two_outputs_are_apart_too(one: str, other: str) -> None:
    with pytest.raises(InputError, match="--output .*--rejects"):
        check_apart({}, {"--output": [one, f"{one}.partial"], "--rejects": [other]})
    check_apart({}, {"--output": ["o.txt", "o.txt.partial"], "--rejects": ["r.txt"]})
    check_apart({}, {"--output": ["/dev/null"], "--rejects": ["/dev/null"]})


def test_a_file_behind_standard_input_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = {0: "a.txt", 1: "out"}
    status = os.fstat
    monkeypatch.setattr(os, "fstat", lambda at: Path(behind[at]).stat() if at in behind else status(at))
    with pytest.raises(InputError, match=r"--output hard.txt and --input - are the same"):
        check_apart({"--input": ["-"]}, {"--output": ["hard.txt"]})
    monkeypatch.setitem(behind, 1, "a.txt")
    with pytest.raises(InputError, match=r"--output - and --input a.txt are the same"):
        check_apart({"--input": ["a.txt"]}, {"--output": ["-"]})
