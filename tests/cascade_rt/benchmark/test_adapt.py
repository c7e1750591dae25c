"""`cascade-rt adapt`: the fastest settings are kept beside the bundle, and followed on this machine alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.benchmark import adapt as module
from cascade_rt.cli import main
from cascade_rt.engine import adapted
from cascade_rt.engine.execution import Execution
from cascade_rt.serving.service import open_runtime


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings, of which the second is faster."""

    def found(*_: object, **__: object) -> list[module.Candidate]:
        fastest = Execution("cpu", 2, spin_us=0)
        return [module.Candidate(fastest, 1.0, 0.5), module.Candidate(Execution("cpu", 1), 2.0, 1.0)]

    monkeypatch.setattr("cascade_rt.cli.adapt.adapt", found)


def test_the_fastest_settings_are_followed_here_and_nowhere_else(
    quick: None, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_bundle(copied).sha256
    assert main(["adapt", "--model-dir", str(copied), "--dry-run"]) == 0
    assert not (copied / adapted.FILE).exists()
    assert main(["adapt", "--model-dir", str(copied)]) == 0
    assert "predict, evaluate and serve now take cpu with 2 threads that do not spin" in capsys.readouterr().out
    assert read_bundle(copied).sha256 == before
    assert adapted.followed(copied, Execution()) == Execution("cpu", 2, spin_us=0)
    assert adapted.followed(copied, Execution(cache="off", spin_us=5)) == Execution("cpu", 2, spin_us=5, cache="off")
    for given in (Execution(threads=3), Execution("openvino"), Execution(low_memory=True)):
        assert adapted.followed(copied, given) == given
    assert open_runtime(str(copied), Execution(spin_us=50)).plan.opened.execution == Execution("cpu", 2, spin_us=0)
    assert CascadeRuntime(copied).plan.opened.execution.threads is None, "the Python interface has its arguments alone"
    monkeypatch.setattr(adapted, "machine", lambda: ("another",))
    assert adapted.followed(copied, Execution()) == Execution()


def test_another_bundle_and_a_damaged_file_are_not_followed(quick: None, copied: Path, pair_bundle: Path) -> None:
    assert main(["adapt", "--model-dir", str(copied)]) == 0
    content = (copied / adapted.FILE).read_text()
    record = json.loads(content)
    for damaged in ("{", "[]", json.dumps(record | {"members": ["0"]}), json.dumps(record | {"threads": None})):
        (copied / adapted.FILE).write_text(damaged)
        assert adapted.followed(copied, Execution()) == Execution()
    assert adapted.followed(pair_bundle, Execution()) == Execution()
    assert adapted.followed("hf:org/name", Execution()) == Execution()


def test_it_measures_each_setting_in_turn(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cpus", lambda: 2)
    monkeypatch.setattr(module, "_providers", lambda: ["cpu"])
    monkeypatch.setattr(module, "_BULK", 8)
    monkeypatch.setattr(module, "_ALONE", 2)
    monkeypatch.setattr(module, "_ROUNDS", 1)
    found = module.adapt(bundle, words="4:1")
    tried = {one.execution for one in found}
    assert tried == {Execution("cpu", 1), Execution("cpu", 2), Execution("cpu", 2, spin_us=0)}
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    assert all(one.alone_ms > 0 and one.bulk_ms > 0 for one in found)
