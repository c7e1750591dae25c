"""Carry out a plan: train, export, tune, report. A killed build continues when it is called again.

Each step leaves files under OUTPUT.build that appear only when they are complete, and a step whose files are there is
not repeated. The bundle appears last.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.finetune import Objective, claim, finetune, logits_of
from cascade_train.tasks import Examples, TaskData, write_examples
from numpy.typing import NDArray

from cascade_build.plan import MemberPlan, Plan
from cascade_build.report import BuildReport, make_report, write_report
from cascade_rt import CascadeRuntime
from cascade_rt.bundle import MANIFEST, write_bundle
from cascade_rt.errors import BundleError
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, cache_folder, collect, open_whole
from cascade_rt.tuning.tune import tune, write_tuning
from cascade_rt.types import Text

REPORT = "report.html"


def work_folder(output: Path) -> Path:
    """Return the folder of a build's members, parts and report."""
    return output.with_name(output.name + ".build")


def build(plan: Plan, output: Path, *, overwrite: bool = False) -> BuildReport:
    """Build a bundle by a plan; return the report, which lies as a page in `work_folder(output)`.

    Raises CascadeError if `output` exists and is not to be replaced, if another build's unfinished work is there, or if
    a step fails; what is finished stays for the next call.
    """
    if output.exists() and not overwrite:
        raise BundleError(f"{output} exists; choose another output folder, or replace that bundle with `overwrite`")
    work = work_folder(output)
    claim(work, plan.described(), begun="run.json")
    journal = Journal(work / "steps.json")
    plan = _as_begun(plan, journal)
    parts, data = plan.parts, plan.parts.data
    for name, part in (("tuning", parts.tuning), ("certification", parts.certification)):
        write_examples(work / f"{name}.jsonl", part, data.labels)
    big, *small = plan.members
    folders = {member.name: work / "members" / member.name for member in plan.members}
    (work / "members").mkdir(exist_ok=True)

    with journal.step(f"train {big.name}", folders[big.name]) as todo:
        if todo:
            _train(big, data, folders[big.name], Objective())
    if small:
        learnt = _with_unlabelled(data, parts.unlabelled)
        answers = work / f"answers-{big.name}.npy"
        with journal.step(f"answers of {big.name}", answers) as todo:
            if todo:
                _keep(
                    answers,
                    logits_of(
                        str(folders[big.name]), learnt, learnt.train, big.recipe.max_length, bf16=big.recipe.bf16
                    ),
                )
        teacher: NDArray[np.float32] = np.load(answers)
        learnt = _answered(learnt, teacher, len(data.train))
        objective = Objective(teacher=teacher, temperature=plan.temperature, distill_weight=plan.distill_weight)
        for member in small:
            with journal.step(f"train {member.name}", folders[member.name]) as todo:
                if todo:
                    _train(member, learnt, folders[member.name], objective)
    made = work / "bundle"
    with journal.step("export", made / MANIFEST) as todo:
        if todo:
            export_bundle([str(folder) for folder in folders.values()], made, precision=plan.precision, calibrate=True)
    with journal.step("tune", None):
        runtime = open_whole(made, preload=True)
        seen, other = (_collected(runtime, part) for part in (parts.tuning, parts.certification))
        found = tune(runtime.bundle, seen, plan.question, held_out=other)
        if found.chosen is None:  # nothing can be guaranteed: the biggest member alone loses nothing
            found = replace(found, chosen=found.alone[-1])
        write_tuning(made, runtime.bundle, found)
    report = make_report(
        plan,
        found,
        runtime,
        records={name: json.loads((folder / RECORD).read_text("utf-8")) for name, folder in folders.items()},
        seconds=journal.seconds,
    )
    write_report(report, work / REPORT)
    write_json(work / "report.json", report.to_json())
    with write_bundle(output, overwrite=overwrite) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    shutil.rmtree(made)
    return report


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
    bf16 = journal.fact("bf16", plan.members[0].recipe.bf16)
    members = tuple(replace(member, recipe=replace(member.recipe, bf16=bf16)) for member in plan.members)
    return replace(plan, members=members)


def _with_unlabelled(data: TaskData, unlabelled: Sequence[Text]) -> TaskData:
    """Return the data with the unlabelled texts behind the training texts; their labels are to be filled in."""
    train = data.train
    return replace(data, train=Examples([*train.texts, *unlabelled], [*train.labels, *([0] * len(unlabelled))]))


def _answered(data: TaskData, teacher: NDArray[np.float32], labelled: int) -> TaskData:
    """Return the data with the teacher's answers as the labels of the unlabelled texts, which are the last."""
    labels = [*data.train.labels[:labelled], *teacher[labelled:].argmax(axis=-1).tolist()]
    return replace(data, train=Examples(data.train.texts, labels))


def _collected(runtime: CascadeRuntime, part: Examples) -> Collected:
    return collect(runtime, part.texts, np.array(part.labels, dtype=np.intp), cache=cache_folder())


def _keep(path: Path, array: NDArray[np.float32]) -> None:
    """Write an array so that its file appears only when it is complete."""
    with (part := path.with_name(f".{path.name}")).open("wb") as stream:
        np.save(stream, array)
    part.replace(path)


class Journal:
    """What a build has done so far, and how long it took, in a file that survives the build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.seconds: dict[str, float] = self._kept.setdefault("seconds", {})
        """Time of each step, over all calls."""

    def fact(self, name: str, value: bool) -> bool:
        """Return what the first call had as `value`."""
        found = bool(self._kept.setdefault(name, value))
        write_json(self._path, self._kept)
        return found

    @contextmanager
    def step(self, name: str, result: Path | None) -> Iterator[bool]:
        """Announce a step and take its time; gives False if its result is there already."""
        if result is not None and result.exists():
            print(f"{name}: done before", file=sys.stderr)
            yield False
            return
        print(f"{name}", file=sys.stderr)
        started = perf_counter()
        try:
            yield True
        finally:  # also of a step that was interrupted
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started
            write_json(self._path, self._kept)
