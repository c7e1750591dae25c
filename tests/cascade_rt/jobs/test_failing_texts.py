"""Texts that a member cannot run cost their rows; a member that runs no text, or has no memory, ends the job."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.engine.stage import Stage
from cascade_rt.errors import CascadeError, InferenceError
from cascade_rt.io.readers import Example, Reject
from cascade_rt.jobs import ray_job
from cascade_rt.jobs.answering import Counts, Lines, answer, answered
from cascade_rt.jobs.ray_job import Pool

from ...toy import CASCADE, Member, encoder_weights, write_bundle
from ..cli.commands import run

GOOD = ["a good film", "so sad", "", "not very witty but lovely", "the cat sat on the mat"]
BAD = ["buzz", "a film with buzz", "buzz buzz"]  # ##z is the last word piece, beyond the table of one member


@pytest.fixture(scope="module", params=["tiny", "big"])
def runtime(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[CascadeRuntime]:
    """A cascade whose tokenizer has a word that one member's table has no row for; no text leaves early."""
    members = [
        Member(
            name,
            encoder_weights(layers=layers, hidden=hidden, seed=seed, words=() if name == request.param else ("x",)),
        )
        for name, layers, hidden, seed in CASCADE
    ]
    folder = tmp_path_factory.mktemp("bundles") / "short"
    write_bundle(folder, members, thresholds=[1.0, 1.0], words=("one",))
    with CascadeRuntime(folder, threads=1) as opened:
        yield opened


def examples(texts: list[str]) -> list[Example | Reject]:
    return [Example(text, {"text": text, "id": row}, f"in:{row}") for row, text in enumerate(texts)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(texts=st.lists(st.sampled_from([*GOOD * 3, *BAD]), min_size=1, max_size=40))
def test_good_texts_are_answered_as_if_the_others_were_not_there(runtime: CascadeRuntime, texts: list[str]) -> None:
    tried: list[int] = []

    def predict(some: Any) -> Any:
        tried.append(len(some))
        return runtime.predict(some)

    found = list(answered(examples(texts), runtime, predict))
    records = [record for part, _ in found for record in part]
    answers = [one for _, some in found for one in some]
    assert [isinstance(record, Reject) for record in records] == [text in BAD for text in texts]
    for record, text in zip(records, texts, strict=True):
        if isinstance(record, Reject):
            assert (record.fields["text"], json.loads(record.row)["text"]) == (text, text)
            assert record.reason.startswith("member ") and "failed on 1 text of" in record.reason
            assert str(record.error) == f"{record.where}: {record.reason}"
    wanted = runtime.predict([text for text in texts if text not in BAD])
    assert [(one.label, one.exit) for one in answers] == [(one.label, one.exit) for one in wanted]
    assert [one.score for one in answers] == pytest.approx([one.score for one in wanted], abs=1e-5)
    bad = sum(text in BAD for text in texts)
    assert len(tried) <= 1 + bad * (2 * math.ceil(math.log2(len(texts))) + 1)


@pytest.mark.parametrize("on_error", ["stop", "skip", "null"])
def test_the_command_names_the_row(
    runtime: CascadeRuntime, tmp_path: Path, on_error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("a good film\nplease buzz\nso sad\n")
    command = ["predict", "--model-dir", runtime.bundle.folder, "--on-error", on_error, "--input", "in.txt"]
    status, lines, error = run(capsys, *command)
    assert status == (0 if on_error == "skip" else 2)
    assert [line["label"] is None for line in lines] == {"stop": [False], "skip": [False] * 2}.get(
        on_error, [False, True, False]
    )
    if on_error == "stop":
        assert "error: in.txt:2: member " in error
        assert main([*map(str, command), "--output", "out.jsonl"]) == 2
        assert "the answers before it are in out.jsonl.partial" in capsys.readouterr().err
    else:
        assert "1 of 3 rows were rejected" in error
    status, lines, error = run(capsys, *command[:5], "buzz", "so sad")
    assert (status, len(lines)) == {"stop": (2, 0), "skip": (0, 1), "null": (2, 2)}[on_error]
    assert on_error != "stop" or "text 0: member" in error


def test_evaluate_and_tune_name_the_row(runtime: CascadeRuntime, capfd: pytest.CaptureFixture[str]) -> None:
    texts = [*GOOD * 12, "please buzz"]
    rows = ({"text": text, "label": row % 3} for row, text in enumerate(texts))
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (["evaluate"], ["tune", "--no-cache"]):
        status, _, error = run(capfd, *command, "--model-dir", runtime.bundle.folder, "--input", "in.jsonl")
        assert (status, error.count("\n")) == (2, 1)
        assert "error: in.jsonl:61: member " in error


@pytest.mark.parametrize("cause", [RuntimeError("Gather: out of data bounds"), MemoryError()])
def test_a_member_that_runs_no_text_ends_the_job(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime, calls = CascadeRuntime(bundle, threads=1), list[int]()

    def fail(self: Stage, session: Any, batch: Any) -> Any:
        if self.entry.name == "big":
            calls.append(len(batch["input_ids"]))
            raise self._failure(cause, batch["input_ids"].shape) from cause
        return run_stage(self, session, batch)

    run_stage = Stage._run
    monkeypatch.setattr(Stage, "_run", fail)
    lines = Lines(io.StringIO(), None, "skip")
    with pytest.raises(InferenceError, match="member 'big' (failed|ran out of memory)"):
        answer(runtime, examples(GOOD * 100), lines)
    assert len(calls) <= 10
    assert lines.counts == Counts()
    status, _, error = run(capsys, "predict", "--model-dir", bundle, "--on-error", "skip", "--threshold", "1", "a")
    assert (status, error.count("\n")) == (2, 1)


def test_answers_of_nan_cost_the_row_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of numbers that are too large for fp16 on some texts only."""
    run_stage = Stage._run

    def overflow(self: Stage, session: Any, batch: Any) -> Any:
        if (batch["attention_mask"].sum(axis=1) == 5).any():  # texts of three words
            raise InferenceError(f"member {self.entry.name!r} answered NaN or infinity; check the model")
        return run_stage(self, session, batch)

    monkeypatch.setattr(Stage, "_run", overflow)
    rejects = io.StringIO()
    lines = Lines(io.StringIO(), rejects, "skip")
    runtime = CascadeRuntime(bundle, threads=1)
    answer(runtime, examples(GOOD), lines)
    assert lines.counts == Counts(answered=4, rejected=1)
    assert json.loads(rejects.getvalue())["where"] == "in:0"
    assert runtime.stats().texts == 4, "a text that was run again is counted once"


@pytest.mark.parametrize("pools", [[range(3)], [range(1), range(1, 2), range(2, 3)]])
def test_on_a_cluster(
    runtime: CascadeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[range]
) -> None:
    """The actors of a job, in this process: one for all members, or one for each."""
    monkeypatch.setattr(ray_job, "_opened", lambda *_: (runtime, dict(enumerate(runtime.plan.stages)), runtime))
    written: dict[str, str] = {}

    def write(part: str, lines: str, receipt: Any) -> Any:
        written[part] = lines
        return receipt(len(lines))

    job: Any = SimpleNamespace(settings=SimpleNamespace(on_error="null"), folder=SimpleNamespace(write=write))
    texts = [*GOOD, BAD[0], *GOOD, BAD[1]]
    part = ray_job._Part("0", "d", examples(texts))
    for members in pools:
        actor = ray_job._Answerer(job, members, Pool())
        part = ray_job._Part.of(actor(part.row()))
    assert (part.work.answered, part.work.rejected) == (10, 2)
    rows = [json.loads(line) for line in written["0"].splitlines()]
    assert [row["id"] for row in rows] == list(range(12))
    assert ["error" in row for row in rows] == [text in BAD for text in texts]
    assert part.work.exits == [0, 0, 10]

    monkeypatch.setattr(Stage, "_run", lambda self, *_: (_ for _ in ()).throw(InferenceError("broken")))
    failed = ray_job._Answerer(job, pools[0], Pool())(ray_job._Part("0", "d", examples(texts)).row())
    error = ray_job._Part.of(failed).work.error
    assert isinstance(error, CascadeError)
    assert str(error) == "broken"
