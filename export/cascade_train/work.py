"""Folders that appear when they are complete, and the work beside them, from which a killed run resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer

from cascade_rt.errors import CascadeError, InputError
from cascade_rt.io.writers import write_json
from cascade_train import RECORD, VALIDATION
from cascade_train.compat import quiet
from cascade_train.progress import Progress
from cascade_train.tasks import TaskData, write_examples

CHECKPOINTS = "checkpoint-*"


def work_folder(output: Path, again: str, suffix: str = "training") -> Path:
    """Return the folder of the work for an output; raise InputError if the output exists. `again`: the verb."""
    if output.exists():
        raise InputError(f"{output} exists; choose another output folder, or delete it to {again} again")
    return output.with_name(f"{output.name}.{suffix}")


def claim(work: Path, run: dict[str, Any], *begun: str) -> None:
    """Make the work folder; if it exists with files like `begun`, or checkpoints, check that it is this run's."""
    settings = work / "run.json"
    if any(path for pattern in begun or (CHECKPOINTS,) for path in work.glob(pattern)) and settings.is_file():
        other = json.loads(settings.read_text("utf-8"))
        differing = [key for key in run if run[key] != other.get(key)]
        if differing:
            key = differing[0]
            raise CascadeError(
                f"{work} holds an unfinished run with another {key} (found {other.get(key)}, expected {run[key]}); "
                "finish it with its arguments, or delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(settings, run)


def last_whole_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint, and delete incomplete ones."""
    whole = []
    for folder in work.glob(CHECKPOINTS):
        try:  # the Trainer writes its state last
            whole.append((int(json.loads((folder / "trainer_state.json").read_text("utf-8"))["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def trained(trainer: Trainer, output: Path, *metrics: str) -> dict[str, Any]:
    """Train from the last whole checkpoint on, with a progress bar of these metrics; return facts for the record."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(output.name, len(trainer.train_dataset), *metrics))
    resume = last_whole_checkpoint(Path(trainer.args.output_dir))
    with quiet():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {
        "steps": trainer.state.global_step,
        "versions": {name: version(name) for name in ("torch", "transformers", "cascade-rt")},
    }


def validated(trainer: Trainer) -> dict[str, Any]:
    """Return the best value of the metric that chose the checkpoint, and all validations."""
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"best": trainer.state.best_metric, "history": history}


def finish(
    work: Path,
    output: Path,
    save: Callable[[Path], object],
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
    data: TaskData | None = None,
) -> None:
    """Write a model's folder with `save`, its tokenizer, record and validation examples; it appears when complete."""
    finished = work / "model"
    shutil.rmtree(finished, ignore_errors=True)
    with quiet():
        save(finished)
    tokenizer.save_pretrained(finished)
    write_json(finished / RECORD, record)
    if data is not None:
        write_examples(finished / VALIDATION, data.validation, data.labels)
    finished.rename(output)
    shutil.rmtree(work)
