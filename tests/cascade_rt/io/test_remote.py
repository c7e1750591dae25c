"""Sources behind URIs are read as files are; file:// stands for all of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cascade_rt import InputError
from cascade_rt.io.readers import input_files, read_examples

pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"in {name}"}) + "\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"in c\n"))
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    (tmp_path / "notes.md").write_text("not a table\n")
    return tmp_path


def texts(source: str) -> list[str]:
    return [str(example.text) for example in read_examples(source, pair=False)]


def test_a_file_a_folder_and_a_pattern(folder: Path) -> None:
    assert texts(f"file://{folder}/a.jsonl") == ["in a"]
    assert texts(f"file://{folder}/c.txt.gz") == ["in c"]
    assert texts(f"file://{folder}") == texts(f"file://{folder}/") == texts(str(folder)) == ["in a", "in b", "in c"]
    assert texts(f"file://{folder}/*.jsonl") == ["in a", "in b"]
    assert texts(f"file://{folder}/[bc].*") == ["in b", "in c"]
    assert input_files(f"file://{folder}/a.jsonl") == [f"file://{folder}/a.jsonl"]


def test_zstandard_and_parquet(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"compressed\n"))
    parquet.write_table(pyarrow.table({"text": ["in a table"]}), tmp_path / "b.parquet")
    assert texts(f"file://{tmp_path}") == ["compressed", "in a table"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("/nothing.jsonl", "no such file or folder; check the URI"),
        ("/nothing/*.jsonl", "no such file or folder; check the URI"),
        ("/notes.md", "unknown format '.md'"),
        ("/*.csv", "found no files; expected some of .jsonl"),
        ("/*/a.jsonl", "found a pattern in the name of a folder, expected one in the file's name alone"),
    ],
)
def test_what_is_not_there(folder: Path, source: str, error: str) -> None:
    with pytest.raises(InputError) as found:
        texts(f"file://{folder}{source}")
    assert error in str(found.value)
    assert f"file://{folder}{source}" in str(found.value)


def test_an_unknown_kind_of_uri() -> None:
    with pytest.raises(InputError, match=r"^gopher://a/b\.txt: cannot be opened \(.*gopher.*\); check the URI$"):
        texts("gopher://a/b.txt")
