"""`cascade-rt tune`, from a labelled file to a bundle that answers as promised."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from cascade_rt import BundleError, CascadeRuntime, InputError, read_bundle
from cascade_rt.bundle import MANIFEST, write_manifest
from cascade_rt.cli import main
from cascade_rt.tuning.collect import collect
from cascade_rt.tuning.report import Question

from ...toy import LABELS
from .conftest import TEXTS

Tune = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(autouse=True)
def _own_cache_and_less_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cascade_rt.tuning.operating_points._POINTS", 300)
    monkeypatch.setattr("cascade_rt.tuning.operating_points._SHARES", (0.1, 0.02))
    monkeypatch.setattr("cascade_rt.tuning.collect._TIMED", 10)


@pytest.fixture(scope="module")
def labelled_rows(bundle: Path) -> list[dict[str, Any]]:
    """Texts with the last member's answers as labels, but for every tenth."""
    answers = CascadeRuntime(bundle, thresholds=1.0).predict(TEXTS)
    return [
        {"text": text, "label": answer.label if at % 10 else LABELS[at // 10 % 3]}
        for at, (text, answer) in enumerate(zip(TEXTS, answers, strict=True))
    ]


@pytest.fixture
def labelled(labelled_rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    return written(tmp_path / "labelled.jsonl", labelled_rows)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str], copied: Path, labelled: Path) -> Tune:
    """Run the command on a copy of the bundle; return its status, its report and what it said."""

    def run(*arguments: object, source: Path = labelled) -> tuple[int, dict[str, Any], str]:
        status = main(["tune", "--model-dir", str(copied), "--input", str(source), "--json", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else {}, captured.err

    return run


def test_the_chosen_thresholds_are_written_and_followed(
    tune: Tune, copied: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report, _ = tune("--max-drop", 0.06)
    chosen, last = report["chosen"], report["alone"][-1]
    assert status == 0
    assert chosen["drop"] <= 0.06
    assert len(chosen["members"]) > 1, "a cascade is worth it here"
    assert chosen["layers_speedup"] >= max(p["layers_speedup"] for p in report["front"] if p["estimated_drop"] <= 0.06)
    runtime = CascadeRuntime(copied)
    assert [member.name for member in runtime.bundle.members] == chosen["members"]
    assert runtime.thresholds == chosen["thresholds"]
    labels = [json.loads(line)["label"] for line in labelled.read_text().splitlines()]
    answers = runtime.predict(TEXTS)
    right = np.array([answer.label == label for answer, label in zip(answers, labels, strict=True)])
    assert right.mean() == chosen["accuracy"]
    big = np.array(
        [
            row.label == label
            for row, label in zip(CascadeRuntime(copied, members=["big"]).predict(TEXTS), labels, strict=True)
        ]
    )
    assert chosen["drop_error"] == pytest.approx(np.std(big.astype(int) - right) / np.sqrt(len(TEXTS)))
    assert last["layers_speedup"] == 1
    assert 4 * len(TEXTS) / sum(answer.layers for answer in answers) == pytest.approx(chosen["layers_speedup"])
    found = runtime.stats()
    assert (found.exits, found.distance, found.p_value) == (chosen["exits"], 0.0, 1.0)
    assert main(["info", "--model-dir", str(copied)]) == 0
    assert "tuned       " + " + ".join(chosen["members"]) in capsys.readouterr().out
    assert main(["push", "--model-dir", str(copied), "--dry-run", "team/commands"]) == 0
    card = capsys.readouterr().out
    shown = [f"{100 * chosen['accuracy']:.2f}%", f"{chosen['latency_speedup']:.2f}x"]
    assert f"| **{' + '.join(chosen['members'])}** | " + " | ".join(f"**{cell}**" for cell in shown) in card
    assert f"| big | {100 * last['accuracy']:.2f}% | 1.00x |" in card, "the last member alone is among the trade-offs"
    manifest = json.loads((copied / MANIFEST).read_text())["tuning"]
    assert manifest["data"] == {"texts": 240, "sha256": report["data"]["sha256"]}


def test_what_is_expected_comes_from_the_last_member(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, members=["tiny", "small", "big"])
    labels = np.arange(len(TEXTS)) % len(LABELS)
    logits = runtime.member_logits(TEXTS)[0].astype(float)
    answers, last = logits.argmax(axis=-1), softmax(logits[-1], axis=-1)
    expected = [[last[row, answer] for row, answer in enumerate(member)] for member in answers]
    for kind in ("layers", "flops", "latency"):
        found = collect(runtime, TEXTS, labels, cache=None).answers[kind].expected
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert collect(runtime, TEXTS, None, cache=None).answers["layers"].expected is None, (
        "answers are compared with its own"
    )


def test_what_the_user_sets_comes_before_what_was_tuned(tune: Tune, copied: Path) -> None:
    tune("--speedup", 4)
    tuned = CascadeRuntime(copied)
    assert [member.name for member in tuned.bundle.members] == ["tiny"]
    tuned.predict(TEXTS[:5])
    assert tuned.stats().p_value == 1.0
    for given, wanted in ((1.0, [1.0, 1.0]), ([0.1, 0.2], [0.1, 0.2])):
        other = CascadeRuntime(copied, thresholds=given)
        other.predict(TEXTS[:5])
        assert other.thresholds == wanted
        assert other.stats().p_value is None  # exits at other thresholds say nothing about the texts


def test_whoever_runs_all_members_of_a_tuned_bundle_gets_the_same_answers(
    tune: Tune, copied: Path, capsys: pytest.CaptureFixture[str], labelled: Path
) -> None:
    """An older runtime does so, and so does `members=`."""
    tune("--speedup", 3.5)
    tuned = CascadeRuntime(copied)
    assert len(tuned.bundle.members) < 3
    every = CascadeRuntime(copied, members=[member.name for member in read_bundle(copied).members])
    assert [row.label for row in every.predict(TEXTS)] == [row.label for row in tuned.predict(TEXTS)]
    assert main(["evaluate", "--model-dir", str(copied), "--input", str(labelled), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    executed = sum(row.layers for row in tuned.predict(TEXTS))
    assert report["cascade"]["layer_speedup"] == pytest.approx(4 * len(TEXTS) / executed)


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(
    tune: Tune, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*arguments: Any, **options: Any) -> Any:
        write_manifest(copied, read_bundle(copied))
        return collect(*arguments, **options)

    monkeypatch.setattr("cascade_rt.cli.tune.collect", replaced)
    status, _, error = tune("--max-drop", 0.05)
    assert status == 2
    assert "replaced while it was tuned" in error
    assert read_bundle(copied).tuning is None


def test_a_second_tuning_sees_all_members_again(tune: Tune, copied: Path) -> None:
    tune("--speedup", 4)
    assert CascadeRuntime(copied).bundle.members[-1].layers < 4
    status, report, _ = tune("--max-drop", 0)
    assert (status, len(report["alone"])) == (0, 3)
    assert report["chosen"]["drop"] <= 0


def timed(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Times as made as the members: 1, 2 and 4 milliseconds, a little more for longer texts."""
    return np.full(len(lengths), 1e-4), np.array([[1e-3], [2e-3], [4e-3]]) + 1e-6 * lengths, 1.2


def test_speedups_and_budgets_are_kept(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report, _ = tune("--speedup", 1.5, "--dry-run")
    assert report["chosen"]["layers_speedup"] >= 1.5 - 1e-9
    assert report["chosen"]["accuracy"] == max(
        point["accuracy"] for point in report["front"] if point["layers_speedup"] >= 1.5 - 1e-9
    )
    _, report, _ = tune("--speedup", 1.5, "--cost", "flops", "--dry-run")
    assert report["chosen"]["flops_speedup"] >= 1.5 - 1e-9
    monkeypatch.setattr("cascade_rt.tuning.collect._latencies", lambda _, texts, lengths: timed(lengths))
    _, report, _ = tune("--budget-ms", 3, "--dry-run")
    assert [point["latency_ms"] for point in report["alone"]] == pytest.approx([1.1, 2.1, 4.1], rel=0.1)
    assert 1.2 < report["chosen"]["latency_ms"] <= 3
    _, report, _ = tune("--budget-ms", 3, "--p95", "--dry-run")
    assert report["chosen"]["latency_p95_ms"] <= 3
    _, report, _ = tune("--max-drop", 0.02, "--shared-threshold", "--all-members", "--dry-run")
    assert len(set(report["chosen"]["thresholds"])) <= 1
    assert len(report["chosen"]["members"]) in (1, 3)


def test_nothing_is_written_unless_asked(tune: Tune, copied: Path) -> None:
    before = (copied / MANIFEST).read_bytes()
    for arguments in ((), ("--max-drop", 0.05, "--dry-run")):
        status, _, _ = tune(*arguments)
        assert status == 0
        assert (copied / MANIFEST).read_bytes() == before


def test_the_report_and_the_picture_are_written_into_a_folder(tune: Tune, copied: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = (copied / MANIFEST).read_bytes()
    for arguments in ((), ("--max-drop", 0.05, "--dry-run")):
        status, report, _ = tune(*arguments, "--output", tmp_path / "seen")
        assert status == 0
        assert (copied / MANIFEST).read_bytes() == before
        assert json.loads((tmp_path / "seen" / "tuning.json").read_text()) == report
        assert (tmp_path / "seen" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(CascadeRuntime, "member_logits", None)
    status, _, error = tune("--output", tmp_path / "seen")
    assert (status, error.count("\n")) == (2, 1)
    assert "pip install 'cascade-rt[plot]'" in error
    assert not (tmp_path / "seen").exists()


def test_what_cannot_be_guaranteed_is_not_written_unless_told(
    tune: Tune, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied / MANIFEST).read_bytes()
    status, report, error = tune("--max-drop", 0.001, "--confidence", 0.95)
    assert (status, report["chosen"]) == (2, None)
    assert "nothing was written" in error
    assert "do not cascade" in report["verdict"]
    assert (copied / MANIFEST).read_bytes() == before
    status, report, _ = tune("--max-drop", 0.001, "--confidence", 0.95, "--fall-back")
    assert (status, report["chosen"]["members"]) == (0, ["big"])
    assert [member.name for member in CascadeRuntime(copied).bundle.members] == ["big"]
    capsys.readouterr()
    main(["info", "--model-dir", str(copied)])
    assert "guarantee" not in capsys.readouterr().out


def test_one_member_has_nothing_to_tune(tune: Tune, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = read_bundle(copied, ["big"])
    write_manifest(copied, bundle)
    assert tune("--max-drop", 0)[1]["chosen"]["members"] == ["big"]
    status, report, _ = tune("--max-drop", 0.2, "--confidence", 0.9)
    assert (status, report["guarantee"]["tested"]) == (2, 0)


def test_a_guarantee_tells_what_it_rests_on(tune: Tune, capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    status, report, _ = tune("--max-drop", 0.3, "--confidence", 0.9)
    found = report["guarantee"]
    assert status == 0
    assert (found["texts"], found["searched_on"]) == (120, 120)
    assert found["bound"] <= 0.3
    assert found["p_value"] <= 0.1
    assert 1 <= found["certified"] <= found["tested"]
    main(["info", "--model-dir", str(copied)])
    assert "guarantee   with confidence 0.9 at most a share of 0.3" in capsys.readouterr().out


def test_without_labels_the_last_member_is_the_measure(tune: Tune, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(TEXTS))
    status, report, _ = tune("--agreement", "--max-drop", 0.1, source=plain)
    assert (status, report["compared_with"]) == (0, "the last member's answers")
    assert report["alone"][-1]["accuracy"] == 1
    assert report["chosen"]["accuracy"] >= 0.9
    assert report["chosen"]["risk"] == pytest.approx(report["chosen"]["drop"])


def test_logits_are_kept_and_a_broken_cache_is_made_anew(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, _ = tune()
    (kept,) = (tmp_path / "cache" / "cascade-rt").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(CascadeRuntime, "member_logits", None)
        _, second, _ = tune()
    assert [point["accuracy"] for point in second["alone"]] == [point["accuracy"] for point in first["alone"]]
    whole = kept.read_bytes()
    for broken in (whole[:100], b"", b"no archive at all"):
        kept.write_bytes(broken)
        _, third, _ = tune()
        assert [point["accuracy"] for point in third["alone"]] == [point["accuracy"] for point in first["alone"]]


def test_the_closing_line_says_when_the_texts_have_changed(
    tune: Tune, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report, _ = tune("--max-drop", 0.2, "--all-members")
    exits = report["chosen"]["exits"]
    assert len(exits) == 3
    assert min(exits[0], exits[-1]) > 10  # there is something to shift
    same = tmp_path / "same.txt"
    same.write_text("\n".join(TEXTS))
    main(["predict", "--model-dir", str(copied), "--input", str(same), "--output", "out.jsonl"])
    error = capsys.readouterr().err
    assert "240 texts, exits" in error
    assert "p = 1.0000" in error
    assert "changed" not in error
    runtime = CascadeRuntime(copied)
    late = [text for text, answer in zip(TEXTS, runtime.predict(TEXTS), strict=True) if answer.exit == 2]
    other = tmp_path / "other.txt"
    other.write_text("\n".join(late * 5))
    main(["predict", "--model-dir", str(copied), "--input", str(other), "--output", "out2.jsonl"])
    assert "the texts have changed: tune again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (30, "found 30 texts, expected at least 50"),
        ("one class", "found no text of 2 of the 3 classes ('fine', 'good')"),
        ("unknown", "found the label 'splendid'"),
    ],
)
def test_data_that_cannot_tell_is_refused(tune: Tune, tmp_path: Path, rows: Any, message: str) -> None:
    made = [{"text": text, "label": LABELS[at % 3]} for at, text in enumerate(TEXTS)]
    if rows == "one class":
        made = [row | {"label": "bad"} for row in made]
    elif rows == "unknown":
        made[7]["label"] = "splendid"
    else:
        made = made[:rows]
    status, _, error = tune("--max-drop", 0.01, source=written(tmp_path / "wrong.jsonl", made))
    assert (status, error.count("\n")) == (2, 1)
    assert message in error


def test_a_text_that_cannot_be_used_is_named_by_its_line(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_rt.tuning.collect._CHUNK", 50)
    rows: list[dict[str, Any]] = [{"text": text, "label": LABELS[at % 3]} for at, text in enumerate(TEXTS)]
    rows[123]["text"] = "half a pair: \ud800"
    status, _, error = tune(source=written(tmp_path / "odd.jsonl", rows))
    assert (status, error.count("\n")) == (2, 1)
    assert "odd.jsonl:124" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-drop", 0.1, "--speedup", 2), "expected one objective"),
        (("--max-drop", -0.1), "--max-drop: found -0.1, expected a share from 0 to below 1"),
        (("--max-drop", "nan"), "--max-drop: found nan, expected a share"),
        (("--speedup", 0), "--speedup: found 0, expected a number above 0"),
        (("--max-drop", 0.1, "--seed", -1), "--seed: found -1, expected a whole number from 0"),
        (("--max-drop", 0.1, "--fall-back"), "--fall-back requires --confidence"),
        (("--speedup", 9), "expected at most 4.00"),
        (("--budget-ms", 1e-6), "expected at least"),
        (("--confidence", 0.95), "expected a maximum drop with it"),
        (("--max-drop", 0.1, "--confidence", 1), "--confidence: found 1, expected a number from 0.5 to below 1"),
        (("--max-drop", 0.1, "--p95"), "expected a budget in ms with it"),
    ],
)
def test_questions_without_an_answer_are_refused(
    tune: Tune, copied: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = (copied / MANIFEST).read_bytes()
    status, _, error = tune(*arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert (copied / MANIFEST).read_bytes() == before


def test_a_bundle_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], labelled: Path) -> None:
    assert main(["tune", "--model-dir", "someone/bundle", "--input", str(labelled), "--max-drop", "0.1"]) == 2
    expected = "someone/bundle: not a local bundle; tune a copy, or make it a dry run"
    assert expected in capsys.readouterr().err


def test_an_unknown_cost_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of auto, layers, flops, latency"):
        Question(cost="money")


@pytest.mark.parametrize(
    "broken",
    [
        7,
        {"members": ["big"]},
        {"members": [], "thresholds": [], "exits": []},
        {"members": ["big", "tiny"], "thresholds": [0.8], "exits": [1, 1]},
        {"members": ["tiny", 3], "thresholds": [0.8], "exits": [1, 1]},
        {"members": ["tiny", "big"], "thresholds": [0.3], "exits": [1, 1]},
        {"members": ["tiny", "big"], "thresholds": [0.8], "exits": [0, 0]},
        {"members": ["tiny", "big"], "thresholds": [0.8], "exits": [1, True]},
        {"members": ["tiny", "big"], "thresholds": [0.8], "exits": [5]},
    ],
)
def test_a_tuning_that_cannot_be_followed_is_refused(copied: Path, broken: Any) -> None:
    bundle = read_bundle(copied)
    object.__setattr__(bundle, "other", {**bundle.other, "tuning": broken})
    write_manifest(copied, bundle)
    with pytest.raises(BundleError, match="tuning"):
        read_bundle(copied)


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["tune", "--model-dir", str(copied), "--input", "no-such-file.csv", "--max-drop", "0.1"]) == 2
    assert "the folder cannot be written; tune a copy" in capsys.readouterr().err
