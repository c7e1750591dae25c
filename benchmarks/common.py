"""What the benchmark scripts share: tasks with a part to report on, and how a script ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascade_train.tasks import GLUE, Examples, TaskData, hold_out, load_evaluation, load_file, load_task

from cascade_rt import CascadeError

RESULTS = Path(__file__).parent / "results"


def read_task(task: str, folder: Path) -> tuple[TaskData, Examples, str]:
    """Return the data to train on, the part to report on, and its name: the dev set, or a part of the training file."""
    if task in GLUE:
        data, share = load_task(task, folder), 0.15
        if any((folder / file).is_file() for files in GLUE[task].dev.values() for file in files):
            return data, next(iter(load_evaluation(task, folder).values())), "dev"
    else:
        data, share = load_file(folder / "train.csv", columns=("text",), label_column="category"), 0.3
    kept, reported = hold_out(data.train, share, 1, nested=task in GLUE and GLUE[task].nested)
    name = f"{share:.0%} of the training file, held out: there is no dev file"
    return replace(data, train=kept), reported, name


def run_command(main: Callable[[], None]) -> None:
    """Run a benchmark; an error that the user can correct ends it with one line."""
    try:
        main()
    except CascadeError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
