"""Jobs that are killed and go on: the output is byte for byte that of a run that nobody disturbed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import pytest

from cascade_rt import CascadeRuntime, InputError
from cascade_rt.cli import main
from cascade_rt.io.readers import read_examples, read_records
from cascade_rt.jobs import answering
from cascade_rt.jobs.answering import Lines, answer
from cascade_rt.jobs.files import JobFiles

from ...toy import WORDS


class Killed(BaseException):
    """In place of SIGKILL, for many of them."""


def write_rows(path: Path, count: int, bad: bool = True) -> None:
    draw = random.Random(0)
    rows = []
    for place in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        rows.append("{broken" if bad and place % 97 == 5 else json.dumps({"id": place, "text": text, "label": "x"}))
    path.write_text("\n".join(rows) + "\n")


def run(runtime: CascadeRuntime, output: Path, resume: bool, kill_at: int | None = None) -> None:
    """Run a job on in.jsonl; raise Killed after so many bytes of output."""
    files = JobFiles(output, output.with_name("rejects.jsonl"), {"bundle": "b"}, resume=resume)

    class Dying(io.TextIOBase):
        written = 0

        def write(self, line: str) -> int:
            self.written += len(line)
            if kill_at is not None and self.written > kill_at:
                raise Killed
            return files.lines.write(line)

    records = files.remaining(read_records("in.jsonl", pair=False))
    lines = Lines(cast(TextIO, Dying()), files.rejects, "null", replace(files.done))
    try:
        answer(runtime, records, lines, files.commit)
        files.finish()
    finally:
        files.close()
        if kill_at is not None and kill_at % 2 == 0 and files._checkpoint.exists():  # what was buffered is lost
            sizes = json.loads(files._checkpoint.read_text("utf-8"))["bytes"]
            for partial, size in zip(files._partials, sizes, strict=True):
                os.truncate(partial, size)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv", "out.csv.gz", "out.parquet"])
def test_fifty_kills_change_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(answering, "CHUNK", 16)
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    runtime = CascadeRuntime(bundle, threads=1)
    write_rows(Path("in.jsonl"), 900)
    (tmp_path / "calm").mkdir()
    run(runtime, tmp_path / "calm" / name, resume=False)
    draw, kills = random.Random(name), 0
    output = tmp_path / name
    while not output.exists():
        try:
            run(runtime, output, resume=True, kill_at=draw.randint(0, 2500) if kills < 50 else None)
        except Killed:
            kills += 1
    assert kills == 50
    for file in (name, "rejects.jsonl"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "calm" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["calm", "in.jsonl", "rejects.jsonl", name])


def test_every_format_has_the_same_rows(bundle: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow.parquet")
    write_rows(Path("in.jsonl"), 60)
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e.csv.gz"):
        arguments = ["--input", "in.jsonl", "--output", name, "--on-error", "null"]
        assert main(["predict", "--model-dir", str(bundle), *arguments]) == 2  # one row is broken
    lines = [json.loads(line) for line in Path("a.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 60
    assert gzip.decompress(Path("b.jsonl.gz").read_bytes()) == Path("a.jsonl").read_bytes()
    assert gzip.decompress(Path("e.csv.gz").read_bytes()) == Path("c.csv").read_bytes()
    columns = ["id", "text", "input_label", "label", "score", "exit", "layers", "truncated", "error"]
    table = arrow.read_table("d.parquet")
    assert table.column_names == columns
    assert [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()] == [
        {name: value for name, value in line.items() if value is not None} for line in lines
    ]
    with Path("c.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == columns
    assert [row["label"] for row in rows] == [line["label"] or "" for line in lines]


def test_a_killed_command_goes_on_and_says_what_is_there(bundle: Path, tmp_path: Path) -> None:
    write_rows(Path("in.jsonl"), 30_000, bad=False)
    # A shell starts its background jobs, and so perhaps the tests, with SIGINT ignored, and nohup with SIGHUP.
    code = "import signal, cascade_rt.cli; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    command = [sys.executable, "-c", f"{code}raise SystemExit(cascade_rt.cli.main())"]
    command += ["predict", "--model-dir", str(bundle), "--threads", "1"]
    command += ["--input", "in.jsonl", "--output", "out.jsonl"]
    for signum, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        resume = [] if signum == signal.SIGKILL else ["--resume"]
        before = covered()
        process = subprocess.Popen([*command, *resume], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and covered() <= before:
            time.sleep(0.01)
        process.send_signal(signum)
        _, error = process.communicate()
        assert process.returncode == status, error
        assert ("--resume goes on after" in error) == (signum != signal.SIGKILL), error
        assert not Path("out.jsonl").exists()
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "rows of an interrupted run; resume it, or delete" in refused.stderr
    other = subprocess.run([*command, "--resume", "--threshold", "0.5"], capture_output=True, text=True, check=False)
    assert "is of a run with another thresholds" in other.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["id"] for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert ids == list(range(30_000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def covered() -> int:
    """Return the number of rows that the checkpoint covers."""
    try:
        return int(json.loads(Path("out.jsonl.checkpoint").read_text("utf-8"))["records"])
    except (OSError, ValueError):
        return 0


def test_another_input_is_not_continued(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "CHUNK", 16)
    runtime = CascadeRuntime(bundle, threads=1)
    write_rows(Path("in.jsonl"), 100)
    with pytest.raises(Killed):
        run(runtime, tmp_path / "out.jsonl", resume=False, kill_at=5000)
    content = Path("in.jsonl").read_text()
    for other in (content.replace('"id": 3,', '"id": 30,'), content[:200], ""):
        Path("in.jsonl").write_text(other)
        with pytest.raises(InputError, match="the first [0-9]+ rows of the input are not those of the interrupted run"):
            run(runtime, tmp_path / "out.jsonl", resume=True)
    Path("in.jsonl").write_text(content)
    run(runtime, tmp_path / "out.jsonl", resume=True)


def test_two_at_once_do_not_write_one_file(tmp_path: Path) -> None:
    first = JobFiles(tmp_path / "out.jsonl", None, {}, resume=False)
    with pytest.raises(InputError, match="another process is writing it"):
        JobFiles(tmp_path / "out.jsonl", None, {}, resume=False)
    first.close()
    JobFiles(tmp_path / "out.jsonl", None, {}, resume=False).close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("a film\n" * 3000)
    Path("out.jsonl.partial").symlink_to("/dev/full")
    assert main(["predict", "--model-dir", str(bundle), "--input", "in.txt", "--output", "out.jsonl"]) == 2
    assert "out.jsonl: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv.gz", "a.txt.zst", "a.ndjson.gz", "folder", "*.part.tsv"]
)
def test_inputs(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "folder":
        Path("folder").mkdir()
        Path("folder/b.csv").write_text("text\ntwo\n")
        Path("folder/a.jsonl").write_text('{"text": "one"}\n')
        Path("folder/.hidden.csv").write_text("text\nthree\n")
        Path("folder/notes.md").write_text("no data")
    elif name == "*.part.tsv":
        Path("2.part.tsv").write_text("text\ntwo\n")
        Path("1.part.tsv").write_text("text\none\n")
    elif name.endswith(".zst"):
        zstandard: Any = pytest.importorskip("zstandard")
        Path(name).write_bytes(zstandard.compress(b"one\ntwo\n"))
    elif name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(lines if "json" in name else b"text\none\ntwo\n"))
    else:
        Path(name).write_bytes(json.dumps(rows).encode() if name == "a.json" else lines)
    assert [row.text for row in read_examples(name, pair=False)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read .*[Nn]ot a gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:60], "a.jsonl.gz.* cannot be read"),
        ("a.json", b'{"text": "a"}', "a.json: found JSON of type dict, expected an array of objects"),
        ("a.json", b'["a"]', "a.json:1: found JSON of type str, expected an object"),
        ("a.json", b"[", "a.json: not JSON"),
    ],
)
def test_inputs_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(read_examples(name, pair=False))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(InputError, match="empty: found no files; expected some of .jsonl"):
        list(read_examples("empty", pair=False))
    with pytest.raises(InputError, match=r"no\*\.csv: no such file, and as a pattern it found no files"):
        list(read_examples("no*.csv", pair=False))
