"""Files out: whole or not at all, strict JSON, no field lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.errors import InputError
from cascade_rt.io.tables import open_rows
from cascade_rt.io.writers import check_ending, json_line, open_output, write_json


def test_an_output_appears_only_when_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_output(tmp_path / "out.jsonl") as stream:
        stream.write("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.jsonl").write_text("old")
    with open_output(tmp_path / "out.jsonl") as stream:
        stream.write("n\udc00w")
        assert (tmp_path / "out.jsonl").read_text() == "old"
    assert (tmp_path / "out.jsonl").read_text() == "n\\udc00w"


def test_a_device_is_written_to_and_not_replaced() -> None:
    with open_output("/dev/null") as stream:
        stream.write("gone")
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs /dev/fd")
def test_a_pipe_behind_a_link_is_written_to() -> None:
    """As of /dev/stdout, and of the shell's >(command)."""
    reading, writing = os.pipe()
    try:
        for open_it in (open_output, open_rows):
            with open_it(f"/dev/fd/{writing}") as stream:
                stream.write("through\n")
            assert os.read(reading, 99) == b"through\n"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"), open_output(tmp_path / "no" / "out.jsonl"):
        pass
    with pytest.raises(InputError, match="it is a folder; name a file"), open_output(tmp_path):
        pass


def test_a_name_that_ends_otherwise_than_its_format_is_refused(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.ONNX", "a", "b.c/a"):
        check_ending(name, ".onnx")
    with pytest.raises(InputError, match=r"cannot write a.json: found a name that ends in .json, expected .onnx"):
        check_ending("a.json", ".onnx")


def test_json_is_written_whole_and_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"label": "schön", "n": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"label": "schön", "n": [1, None]}
    assert "schön" in (tmp_path / "a.json").read_text("utf-8")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"n": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["n"] == [1, None], "the old file is still whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


names = st.sampled_from(["label", "score", "input_label", "input_input_label", "text", "id"])


@given(st.lists(st.tuples(names, st.integers()), max_size=6, unique_by=lambda pair: pair[0]))
def test_every_field_of_the_input_stays_and_in_its_order(pairs: list[tuple[str, int]]) -> None:
    answer = {"label": "good", "score": 0.5}
    line = json_line(dict(pairs), answer)
    assert line.endswith("}\n")
    written = json.loads(line)
    kept = [(name, value) for name, value in written.items() if name not in answer]
    assert [value for _, value in kept] == [value for _, value in pairs]
    for (name, _), (original, _) in zip(kept, pairs, strict=True):
        assert name == original or (original in answer and name.removeprefix("input_").endswith(original))
    assert {name: written[name] for name in answer} == answer
    assert list(written)[-2:] == ["label", "score"]
