"""An exit rule of one's own, with a state, through the manifest, predict, the command line, tuning and the server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from cascade_rt import BundleError, CascadeRuntime, InputError, MaximumProbability, Patience, read_bundle
from cascade_rt.bundle.manifest import EXIT_RULES
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.exit_rules import register
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings
from cascade_rt.tuning.collect import collect
from cascade_rt.tuning.report import Question
from cascade_rt.tuning.tune import tune, write_tuning

from ..toy import WORDS, cascade_members, write_bundle
from .cli.commands import run
from .margin_votes import MarginVotes
from .serving.conftest import listening

del EXIT_RULES[MarginVotes.kind]  # which its import has registered; no test of another file knows it

TEXTS = [" ".join(WORDS[at % len(WORDS)] for at in range(start, start + 1 + start % 9)) for start in range(120)]


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    """Register the rule for the tests of this file."""
    register(MarginVotes)
    yield
    del EXIT_RULES[MarginVotes.kind]


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"format_version": 2, "exit_rule": {"kind": "margin_votes", "enough": 0.6}}
    return write_bundle(tmp_path_factory.mktemp("voting") / "bundle", cascade_members(), thresholds=(), extra=extra)


def expected(folder: Path, enough: float) -> list[int]:
    """Return the exits by a plain loop over the texts."""
    runtime, exits = CascadeRuntime(folder), []
    for rows in runtime.task.probabilities(runtime.member_logits(TEXTS)[0]).transpose(1, 0, 2):
        total, exit = 0.0, -1
        while exit < 2 and total < enough:
            exit += 1
            first, second, *_ = sorted(rows[exit].tolist(), reverse=True)
            total += first - second
        exits.append(exit)
    return exits


def test_texts_leave_where_a_loop_says(voting: Path) -> None:
    runtime = CascadeRuntime(voting)
    wanted = expected(voting, 0.6)
    assert set(wanted) == {0, 1, 2}
    assert [one.exit for one in runtime.predict(TEXTS)] == wanted
    assert [runtime.predict([text])[0].exit for text in TEXTS] == wanted
    assert [one.exit for one in runtime.changed("enough", 1.4).predict(TEXTS)] == expected(voting, 1.4)
    assert {one.exit for one in runtime.without_exits().predict(TEXTS)} == {2}


def test_a_rule_can_replace_another(voting: Path, bundle: Path) -> None:
    runtime = CascadeRuntime(bundle).with_exit_rule(MarginVotes(0.6))
    assert [one.exit for one in runtime.predict(TEXTS)] == expected(voting, 0.6)
    patient = [one.exit for one in CascadeRuntime(voting).with_exit_rule(Patience(1)).predict(TEXTS)]
    assert set(patient) == {1, 2}, "the first member agrees with none before it"


def test_the_command_line_has_its_option(voting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answers, _ = run(capsys, "predict", "--model-dir", voting, "--enough", "1.4", *TEXTS)
    assert (status, [answer["exit"] for answer in answers]) == (0, expected(voting, 1.4))
    assert (
        "--enough: found 0, expected a number above 0"
        in run(capsys, "predict", "--model-dir", voting, "--enough", "0", "a")[2]
    )


def test_tuning_tries_its_candidates(voting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voting = shutil.copytree(voting, tmp_path / "copied")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    asked = ["--agreement", "--speedup", "1.3", "--no-cache", "--json"]
    status, (report, *_), _ = run(capsys, "tune", "--model-dir", voting, "--input", source, *asked)
    chosen = report["chosen"]
    assert status == 0
    assert read_bundle(voting).exit_rule == chosen["exit_rule"]
    exits = expected(voting, chosen["exit_rule"]["enough"])
    assert chosen["exits"] == np.bincount(exits, minlength=3).tolist()
    assert chosen["layers_speedup"] > 1


def test_a_report_on_another_rule_is_not_written(voting: Path, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "copied")
    runtime = CascadeRuntime(folder).with_exit_rule(Patience(1))
    report = tune(runtime.bundle, collect(runtime, TEXTS, None, cache=None), Question(speedup=1.0))
    before = (folder / "cascade.json").read_bytes()
    with pytest.raises(InputError, match="found a report on the exit rule patience, expected maximum_probability"):
        write_tuning(folder, runtime.bundle, report)
    assert (folder / "cascade.json").read_bytes() == before


def test_members_without_a_threshold_let_no_text_leave(four_segments: Path) -> None:
    runtime = CascadeRuntime(four_segments)
    names = [member.name for member in runtime.bundle.members]
    some = runtime.with_members(names[:2]).with_exit_rule(MaximumProbability((0.5,)))
    assert some.with_members(None).thresholds == [0.5, 1.0, 1.0]
    some.with_members(None).predict(TEXTS)


def test_counts_under_another_rule_are_not_compared_with_tuning(four_segments: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(four_segments, tmp_path / "copied")
    whole = CascadeRuntime(folder)
    write_tuning(
        folder, whole.bundle, tune(whole.bundle, collect(whole, TEXTS, None, cache=None), Question(speedup=1.0))
    )
    tuned = CascadeRuntime(folder)
    assert tuned.stats().tuned_rates is not None
    assert tuned.with_patience(tuned.exit_rule.settings["patience"] + 1).stats().tuned_rates is None


def test_the_server_keeps_the_state_of_each_request(voting: Path) -> None:
    wanted = expected(voting, 0.6)
    with (
        listening(Service({"toy": str(voting)}, Settings(execution=Execution(threads=1)))) as address,
        httpx.Client() as client,
    ):
        found = client.post(f"http://{address}/v1/classify", json={"texts": TEXTS}).json()["predictions"]
    assert [row["exit"] for row in found] == wanted


def test_a_bundle_with_a_rule_that_is_not_known_is_refused_by_name(
    voting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(EXIT_RULES, "margin_votes")
    with pytest.raises(BundleError, match="found the kind 'margin_votes', this cascade-rt knows maximum_probability"):
        CascadeRuntime(voting)
