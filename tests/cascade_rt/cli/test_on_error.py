"""Rows that cannot be used: what is written, what is not, and what the command says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt import CascadeRuntime
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io import lines as lines_module
from cascade_rt.io.readers import Example, Reading, Reject, read_examples, read_records
from cascade_rt.jobs import answering, files

from .commands import run

GOOD = ["a good film", "so sad", "the cat sat on the mat", "witty", ""]
BAD = ['{"text": 1}', "{", '["text"]', '{"txt": "a"}', '{"text": "half \\ud83d"}']
NULL = {"label": None, "score": None, "exit": None, "layers": None, "truncated": None}


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> CascadeRuntime:
    return CascadeRuntime(bundle)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(rows=st.lists(st.sampled_from([*GOOD, *BAD]), min_size=1, max_size=40), data=st.data())
def test_good_rows_are_answered_as_if_the_bad_ones_were_not_there(
    runtime: CascadeRuntime,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[str],
    data: Any,
) -> None:
    lines = [row if row in BAD else json.dumps({"text": row, "id": place}) for place, row in enumerate(rows)]
    Path("in.jsonl").write_text("\n".join(lines))
    how = data.draw(st.sampled_from(["stop", "skip", "null"]))
    rejects = [] if how == "stop" else ["--rejects", "rejects.jsonl"]
    status, found, error = run(
        capsys, "predict", "--model-dir", bundle, "--input", "in.jsonl", "--on-error", how, *rejects
    )
    bad = [place for place, row in enumerate(rows) if row in BAD]
    stopped = bad[0] if how == "stop" and bad else len(rows)
    expected: list[dict[str, Any]] = []
    for place, row in enumerate(rows[:stopped]):
        if row in BAD:
            expected += [NULL] if how == "null" else []
        else:
            answer = runtime.predict([row])[0]
            expected.append({"id": place, "text": row, "label": answer.label, "exit": answer.exit})
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert wanted.items() <= line.items()
        assert (line["label"] is None) == ("error" in line)
    assert status == (2 if bad and how != "skip" else 0)
    if how == "stop":
        assert not bad or f"in.jsonl:{bad[0] + 1}: " in error
        return
    assert (f"{len(bad)} of {len(rows)} rows were rejected" in error) == bool(bad)
    listed = [json.loads(line) for line in Path("rejects.jsonl").read_text("utf-8").splitlines()]
    assert [line["where"] for line in listed] == [f"in.jsonl:{place + 1}" for place in bad]
    assert all(line["reason"] and json.loads(json.dumps(line["row"])) for line in listed)
    assert [line["row"] for line in listed if "half" not in line["row"]] == [
        rows[place] for place in bad if "half" not in rows[place]
    ]


@pytest.mark.parametrize(
    ("name", "content", "wheres"),
    [
        ("a.txt", b"fine\ncaf\xe9\nfine\n\xff\n", ["a.txt:2", "a.txt:4"]),
        ("a.csv", b"id,text\n1,fine\n2,caf\xe9\n3\n4,fine\n5,a,b\n", ["a.csv:3", "a.csv:4", "a.csv:6"]),
        ("a.csv", b'id,text\n1,fine\n2,"two\nlines"x\n3,fine\n', ["a.csv:3", "a.csv:4"]),
        ("a.tsv", b"id\ttext\n1\tfine\n2\n3\tfine\n4\tcaf\xe9\n", ["a.tsv:3", "a.tsv:5"]),
        (
            "a.jsonl",
            b'{"text": "fine"}\n\n{"text": "caf\xe9"}\n{"text": null}\n{"text": "fine"}\n',
            ["a.jsonl:3", "a.jsonl:4"],
        ),
    ],
)
def test_rejected_records_have_their_exact_line_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, wheres: list[str]
) -> None:
    Path(name).write_bytes(content)
    records = list(read_records(name, pair=False))
    rejected = [record for record in records if isinstance(record, Reject)]
    assert [record.where for record in rejected] == wheres
    kept = [record.text for record in records if not isinstance(record, Reject)]
    assert kept == ["fine"] * 2
    with pytest.raises(InputError, match=f"^{wheres[0]}: "):
        list(read_examples(name, pair=False))
    for record in rejected:
        if "byte" in record.reason:
            line = content.split(b"\n")[int(record.where.split(":")[1]) - 1]
            assert record.row.encode("utf-8", "surrogateescape") == line
            assert record.reason.startswith(("found byte 0xe9 at character", "found byte 0xff at character 1,"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    Path("a.csv").write_bytes('text,n\r\n"na\u00efve, caf\u00e9",1\r\n'.encode(encoding))
    named = None if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding
    (row,) = read_examples("a.csv", Reading(encoding=named), pair=False)
    assert (row.text, row.fields["n"]) == ("na\u00efve, caf\u00e9", "1")


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    Path("a.txt").write_text("a")
    with pytest.raises(InvalidOption, match="`encoding`: found 'utf-9', expected one that Python knows"):
        list(read_examples("a.txt", Reading(encoding="utf-9"), pair=False))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_line_that_is_too_long_is_one_rejected_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(lines_module, "LONGEST_LINE", 100)
    wrap = {"a.txt": "{}", "a.csv": '"{}"', "a.jsonl": '{{"text": "{}"}}'}[name]
    header = ["text"] if name == "a.csv" else []
    rows = [*header, wrap.format("a"), wrap.format("b" * 1000), wrap.format("c"), wrap.format("d" * 50)]
    Path(name).write_text("\n".join(rows))
    first, second, *others = read_records(name, pair=False)
    assert isinstance(second, Reject)
    assert "found a line of over 100 characters" in second.reason
    assert [record.text for record in (first, *others) if not isinstance(record, Reject)] == ["a", "c", "d" * 50]


@pytest.mark.parametrize("length", [99, 100, 101])
def test_only_lines_over_the_limit_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(lines_module, "LONGEST_LINE", 100)
    Path("a.txt").write_text("x" * length + "\nnext\n")
    first, second = read_records("a.txt", pair=False)
    assert isinstance(first, Reject) == (length > 100)
    assert isinstance(second, Example)
    assert second.text == "next"


def test_rejects_are_for_jobs_that_go_on(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    status, _, error = run(capsys, "predict", "--model-dir", bundle, "--rejects", "r.jsonl", "a text")
    assert status == 2
    assert "--on-error skip or null" in error


def test_a_missing_column_is_not_a_matter_of_rows(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    Path("a.csv").write_text("q\nx\ny\n")
    status, lines, error = run(
        capsys, "predict", "--model-dir", bundle, "--input", "a.csv", "--on-error", "skip", "--text-column", "text"
    )
    assert (status, lines) == (2, [])
    assert "no column 'text'; found 'q'; name one of these" in error
    status, _, error = run(capsys, "predict", "--model-dir", bundle, "--input", "a.csv")
    assert (status, error.endswith("name its column\n")) == (2, True)
    labels = ["--text-column", "q", "--label-column", "l"]
    status, _, error = run(capsys, "evaluate", "--model-dir", bundle, "--input", "a.csv", *labels)
    assert (status, error.endswith("no column 'l'; found 'q'; name one of these\n")) == (2, True)


def write_good_and_bad_rows() -> None:
    Path("in.jsonl").write_text('{"text": "a film"}\nbroken\n{"text": "so sad"}\n')


@pytest.mark.parametrize("target", ["-", "pipe"])
def test_rejects_of_a_file_may_go_to_a_stream(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    write_good_and_bad_rows()
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    command = ["predict", "--model-dir", bundle, "--input", "in.jsonl", "--output", "out.jsonl"]
    status, lines, error = run(capsys, *command, "--on-error", "skip", "--rejects", target)
    assert (status, error.endswith("1 of 3 rows were rejected\n")) == (0, True)
    rejects = lines if target == "-" else [json.loads(os.read(reader, 10_000))]
    os.close(reader)
    assert [reject["row"] for reject in rejects] == ["broken"]
    assert Path("pipe").is_fifo(), "not replaced by a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "pipe"]


def test_only_rows_that_a_resumed_run_keeps_are_promised(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good_and_bad_rows()
    command = ["predict", "--model-dir", bundle, "--input", "in.jsonl", "--output", "out.jsonl"]
    _, _, error = run(capsys, *command)
    assert error.endswith("the answers before it are in out.jsonl.partial\n")
    monkeypatch.setattr(answering, "CHUNK", 1)
    _, _, error = run(capsys, *command)
    assert error.endswith("and --resume goes on after 1 rows\n")


def test_an_interrupted_run_is_not_lost_for_other_rejects(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in.jsonl").write_text('{"text": "a film"}\n{"text": "so sad"}\n')
    monkeypatch.setattr(answering, "CHUNK", 1)
    command = ["predict", "--model-dir", bundle, "--input", "in.jsonl", "--output", "out.jsonl", "--on-error", "skip"]
    with monkeypatch.context() as patch:
        patch.setattr(files.JobFiles, "finish", lambda _: _raise(InputError("stopped")))
        assert run(capsys, *command, "--rejects", "a.jsonl")[0] == 2
    for rejects in ([], ["--rejects", "b.jsonl"]):
        assert "rows of an interrupted run" in run(capsys, *command, *rejects)[2]
        assert "is of a run with another rejects" in run(capsys, *command, *rejects, "--resume")[2]
    assert run(capsys, *command, "--rejects", "a.jsonl", "--resume")[0] == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 2


def _raise(error: Exception) -> None:
    raise error


def test_half_a_surrogate_pair_is_written_as_its_escape(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in.jsonl").write_text('{"text": "a film"}\n{"text": "half a pair: \\ud800"}\n')
    command = ["--input", "in.jsonl", "--on-error", "null", "--output"]
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        status, _, error = run(capsys, "predict", "--model-dir", bundle, *command, name)
        assert (status, "1 of 2 rows were rejected" in error) == (2, True)
    assert "half a pair: \\ud800" in Path("out.csv").read_text("utf-8")
    assert parquet.read_table("out.parquet").to_pylist()[1]["text"] == "half a pair: \\ud800"
