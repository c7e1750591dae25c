"""Carry out a plan: train, export, tune, report. A killed build continues when it is called again.

Each step leaves files under OUTPUT.build that appear only when they are complete, and a step whose files are there is
not repeated. The bundle appears last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_export.member import AUTO
from cascade_train import RECORD
from cascade_train.averaging_training import train_averaging
from cascade_train.finetune import LABELS_ALONE, Objective, finetune, logits_of
from cascade_train.progress import alive
from cascade_train.tasks import Examples, TaskData, write_examples
from cascade_train.unlabelled import with_answers, with_unlabelled
from numpy.typing import NDArray

from cascade_build.plan import MemberPlan, NetworkPlan, Plan, preflight
from cascade_build.report import BuildReport, make_report, write_report
from cascade_build.trial import Start, try_export
from cascade_rt import CascadeRuntime
from cascade_rt.bundle import check_target, write_bundle
from cascade_rt.errors import CascadeError
from cascade_rt.io.caches import cache_folder
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, collect, open_whole
from cascade_rt.tuning.plot import pyplot
from cascade_rt.tuning.report import TuningReport
from cascade_rt.tuning.tune import members_alone, tune, write_tuning

REPORT = "report.html"


def work_folder(output: Path) -> Path:
    """Return the folder of a build's members, parts and report."""
    return output.with_name(output.name + ".build")


def build(
    plan: Plan, output: Path, *, overwrite: bool = False, announce: Callable[[Plan], object] = lambda _: None
) -> BuildReport:
    """Build a bundle by a plan; return the report, which lies as a page in `work_folder(output)`.

    Steps whose settings have changed since an earlier call are repeated. `announce` gets the plan when all checks are
    passed, unless an earlier call began the work. Raises CascadeError if `output` exists and is
    not to be replaced, if the work folder belongs to other data, or if a step fails; finished steps stay for the next
    call.
    """
    check_target(output, overwrite=overwrite)
    pyplot()  # fails before the work, not after
    preflight(plan)
    work = work_folder(output)
    _claim(work, plan.data_settings())
    journal = Journal(work / "steps.json")
    plan = _as_begun(plan, journal)
    if not journal.seconds:
        announce(plan)
    parts, data = plan.parts, plan.parts.data
    for name, part in (("tuning", parts.tuning), ("certification", parts.certification)):
        write_examples(work / f"{name}.jsonl", part, data.labels)
    big = plan.members[0]
    every: list[MemberPlan | NetworkPlan] = [*plan.members, *([plan.network] if plan.network else [])]
    folders = {member.name: work / "members" / member.name for member in every}
    settings = {member.name: plan.member_settings(member) for member in every}
    (work / "members").mkdir(exist_ok=True)

    _try_export(plan, work, journal)
    with journal.step(f"train {big.name}", folders[big.name], settings[big.name]) as todo:
        if todo:
            _train(big, data, folders[big.name], Objective())
    if len(every) > 1:
        _train_small(plan, work, folders, journal)
    bundle = work / "bundle"
    with journal.step("export", bundle, {"members": settings, "precision": plan.precision}) as todo, alive("export"):
        if todo:
            sources = [str(folder) for folder in folders.values()]
            calibrate = not data.several  # whose cuts are of the probabilities that training ended with
            check = Check(max_accuracy_drop=plan.max_accuracy_drop, calibrate=calibrate)
            export_bundle(sources, bundle, precision=plan.precision, check=check)
    with journal.step("tune", None, None), alive("tune"):
        runtime = open_whole(bundle, preload=True)
        found, measured = _tuned(runtime, plan)
        write_tuning(bundle, runtime.bundle, found)
    records = {name: json.loads((folder / RECORD).read_text("utf-8")) for name, folder in folders.items()}
    report = make_report(plan, found, runtime, measured, records=records, seconds=journal.seconds)
    write_report(report, work / REPORT)
    write_json(work / "report.json", report.to_json())
    with write_bundle(output, overwrite=overwrite) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    _remove(bundle)
    return report


def _train_small(plan: Plan, work: Path, folders: Mapping[str, Path], journal: Journal) -> None:
    """Train all members but the biggest: they learn its answers.

    The network without layers does so only where there are texts without labels.
    """
    big, *small = plan.members
    student_data, objective = plan.parts.data, LABELS_ALONE
    if plan.teaches:
        teacher, student_data = _answers(plan, work, folders[big.name], journal)
        objective = Objective(teacher=teacher, temperature=plan.temperature, distill_weight=plan.distill_weight)
    for member in small:
        with journal.step(f"train {member.name}", folders[member.name], plan.member_settings(member)) as todo:
            if todo:
                _train(_continued(member, big, folders[big.name]), student_data, folders[member.name], objective)
    if (network := plan.network) is not None:
        soft = replace(objective, temperature=network.temperature, distill_weight=network.distill_weight)
        with journal.step(f"train {network.name}", folders[network.name], plan.member_settings(network)) as todo:
            if todo:
                train_averaging(
                    student_data,
                    folders[network.name],
                    tokenizer=str(folders[big.name]),
                    unigrams=str(folders[big.name]),
                    network=network.network,
                    recipe=network.recipe,
                    objective=soft if plan.parts.unlabelled else LABELS_ALONE,
                )


def _answers(plan: Plan, work: Path, big: Path, journal: Journal) -> tuple[NDArray[np.float32], TaskData]:
    """Return the biggest member's logits for all texts that others learn from, and these texts."""
    recipe, teaching, labelled = plan.members[0].recipe, plan.teaching(), len(plan.parts.data.train)
    data = with_unlabelled(plan.parts.data, plan.parts.unlabelled)
    answers = work / f"answers-{big.name}.npy"
    given = {key: teaching[key] for key in ("teacher", "unlabelled")}
    with journal.step(f"answers of {big.name}", answers, given) as todo:
        if todo:
            _write_array(answers, logits_of(str(big), data, data.train, recipe.max_length, bf16=recipe.bf16))
    teacher: NDArray[np.float32] = np.load(answers, allow_pickle=False)
    return teacher, with_answers(data, teacher, labelled)


def _try_export(plan: Plan, work: Path, journal: Journal) -> None:
    """Export untrained copies of all members together, to find what does not work before the training."""
    starts = [Start(member.base, member.truncated, member.tokenizer, member.name) for member in plan.members]
    precision = "fp32" if plan.precision == AUTO else plan.precision  # `auto` has to measure, and takes fp32 at worst
    settings = {"members": [vars(start) for start in starts], "precision": precision}
    done = work / "export-tried.json"
    with journal.step("try the export", done, settings) as todo, alive("try the export"):
        if todo:
            data, length = plan.parts.data, plan.members[0].recipe.max_length
            try_export(starts, data.labels, pair=data.pair, max_length=length, precision=precision)
            write_json(done, settings)


def _tuned(runtime: CascadeRuntime, plan: Plan) -> tuple[TuningReport, Collected]:
    """Choose members and thresholds; return them, and the members' answers to the certification part."""
    tuning, measured = (_collected(runtime, part) for part in (plan.parts.tuning, plan.parts.certification))
    found = tune(runtime.bundle, tuning, plan.question, held_out=measured)
    if found.chosen is None:  # nothing can be guaranteed: the biggest member alone loses nothing
        found = replace(found, chosen=found.alone[-1], held_out=members_alone(runtime.bundle, measured)[-1])
    return found, measured


def _claim(work: Path, settings: dict[str, Any]) -> None:
    """Make the work folder, or raise CascadeError if it belongs to a build on other data."""
    file = work / "data.json"
    if file.is_file() and json.loads(file.read_text("utf-8")) != settings:
        raise CascadeError(
            f"{work} belongs to a build on other data, or on another split of them; choose another output folder, or "
            "delete that folder"
        )
    for stale in (*work.glob(".*.partial-*"), *work.glob(".removed-*")):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _remove(path: Path) -> None:
    """Remove a file or folder so that a kill leaves it whole, or under a name that nothing reads."""
    if path.exists():
        aside = path.with_name(f".removed-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()


def _continued(member: MemberPlan, big: MemberPlan, folder: Path) -> MemberPlan:
    """Return the plan of a member that is cut out of the big one: it starts from the fine-tuned layers."""
    if member.truncated is None or member.base != big.base:
        return member
    return replace(member, base=str(folder), tokenizer=None)


def _train(member: MemberPlan, data: TaskData, folder: Path, objective: Objective) -> None:
    finetune(
        member.base,
        data,
        folder,
        layers=member.truncated,
        tokenizer=member.tokenizer,
        recipe=member.recipe,
        objective=objective,
    )


def _as_begun(plan: Plan, journal: Journal) -> Plan:
    """Return the plan in the number format that the build began with: to measure again could choose the other."""
    bf16 = journal.bf16(plan.members[0].recipe.bf16) if plan.bf16 is None else plan.bf16
    members = tuple(replace(member, recipe=replace(member.recipe, bf16=bf16)) for member in plan.members)
    return replace(plan, members=members)


def _collected(runtime: CascadeRuntime, part: Examples) -> Collected:
    return collect(runtime, part.texts, part.answers(len(runtime.bundle.labels)), cache=cache_folder())


def _write_array(path: Path, array: NDArray[np.float32]) -> None:
    """Write an array so that its file appears only when it is complete."""
    with (part := path.with_name(f".{path.name}")).open("wb") as stream:
        np.save(stream, array)
    part.replace(path)


class Journal:
    """The settings and the time of each finished step, in a file that survives the build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self._settings: dict[str, str] = self._state.setdefault("settings", {})
        self.seconds: dict[str, float] = self._state.setdefault("seconds", {})
        """Time of each step, over all calls that could still write it down."""

    def bf16(self, measured: bool) -> bool:
        """Return whether the first call trained in bfloat16; this call's measurement if there was none."""
        first = bool(self._state.setdefault("bf16", measured))
        write_json(self._path, self._state)
        return first

    @contextmanager
    def step(self, name: str, result: Path | None, settings: object) -> Iterator[bool]:
        """Announce a step and take its time; give False if its result, with these settings, is there already."""
        now = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if result is not None and self._settings.get(name, now) != now:
            print(f"{name}: again, because its settings have changed", file=sys.stderr)
            _remove(result)
            _remove(result.with_name(f"{result.name}.training"))
            self.seconds.pop(name, None)
        elif result is not None and result.exists():
            print(f"{name}: done before", file=sys.stderr)
            yield False
            return
        else:
            print(name, file=sys.stderr)
        self._settings[name] = now
        write_json(self._path, self._state)
        started = perf_counter()
        try:
            yield True
        finally:  # also of a step that was interrupted
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started
            write_json(self._path, self._state)
