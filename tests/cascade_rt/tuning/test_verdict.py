"""The verdict of `tune`, and the measure of speed that it takes unless told."""

from __future__ import annotations

import pytest

from cascade_rt.bundle import MemberEntry
from cascade_rt.tuning.report import Choice, Question, verdict


def choice(members: str, ms: float, accuracy: float, threshold: float = 0.9, estimated: float = 0.0) -> Choice:
    names = members.split("+")
    return Choice(
        members=names,
        thresholds=[threshold] * (len(names) - 1),
        accuracy=accuracy,
        drop=0.92 - accuracy,
        drop_error=0.003,
        estimated_drop=estimated or max(0.0, 0.92 - accuracy),
        risk=0.0,
        exits=[1] * len(names),
        layers_speedup=None,
        flops_speedup=None,
        latency_speedup=4.0 / ms,
        latency_ms=ms,
        latency_p95_ms=ms,
        exit_rule={"kind": "maximum_probability"},
    )


ALONE = [choice("dan", 0.1, 0.90), choice("3L", 1.0, 0.91), choice("12L", 4.0, 0.92)]


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            choice("dan+12L", 0.8, 0.921),
            "cascade dan + 12L (without 3L): 5.00x as fast as 12L alone here, 0.10 (+- 0.30) points of accuracy gained "
            "on these texts; dan alone: 40.00x, 2.00 (+- 0.30) points of accuracy lost on these texts",
        ),
        (
            choice("3L+12L", 2.0, 0.92),
            "cascade 3L + 12L (without dan): 2.00x as fast as 12L alone here, 0.00 (+- 0.30) points of accuracy lost "
            "on these texts; 3L alone: 4.00x, 1.00 (+- 0.30) points of accuracy lost on these texts",
        ),
        (
            choice("dan", 0.1, 0.90),
            "do not cascade: use dan alone, 40.00x as fast as 12L alone here, 2.00 (+- 0.30) points of accuracy lost "
            "on these texts",
        ),
        (
            choice("dan+3L", 0.5, 0.90),
            "do not cascade: dan alone is as accurate (90.00%) and as fast here (0.10 ms against 0.50); "
            "tune by measured latency",
        ),
        (
            choice("3L+12L", 4.5, 0.93),
            "do not cascade; tune by measured latency: 0.89x as fast as 12L alone here, 1.00 (+- 0.30) points of "
            "accuracy gained on these texts",
        ),
        (choice("12L", 4.0, 0.92), "do not cascade: use 12L alone"),
    ],
)
def test_the_verdict_names_members_and_the_strongest_rival(chosen: Choice, says: str) -> None:
    found = verdict(Question(max_drop=0.1, cost="flops"), chosen, ALONE, None)
    assert found == says
    by_latency = verdict(Question(max_drop=0.1, cost="latency"), chosen, ALONE, None)
    assert by_latency == says.replace("; tune by measured latency", ""), "no advice that was followed already"


def test_a_member_that_the_objective_rejects_is_no_rival() -> None:
    lucky = choice("dan", 0.1, 0.92, estimated=0.03)
    found = verdict(Question(max_drop=0.01, cost="latency"), choice("dan+12L", 0.8, 0.92), [lucky, *ALONE[1:]], None)
    assert found.startswith("cascade dan + 12L (without 3L): 5.00x as fast")
    as_good = choice("dan", 0.1, 0.92)
    found = verdict(Question(max_drop=0.01, cost="latency"), choice("dan+12L", 0.8, 0.92), [as_good, *ALONE[1:]], None)
    assert found.startswith("do not cascade: dan alone is as accurate")


def test_speed_is_measured_by_layers_where_all_members_have_some() -> None:
    def entry(layers: int) -> MemberEntry:
        return MemberEntry(f"{layers}L", "", "", layers, 8, 1, "fp32", None)

    layered, without = [entry(3), entry(12)], [entry(0), entry(12)]
    assert [Question().measured_by(members) for members in (layered, without)] == ["layers", "latency"]
    assert Question(cost="layers").measured_by(without) == "layers"
    assert Question(cost="flops").measured_by(layered) == "flops"
    assert Question(budget_ms=3, cost="flops").measured_by(layered) == "latency"
