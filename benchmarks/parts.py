"""The parts of a task as files, for the commands of cascade-rt: those that the other scripts train, tune and report on.

    python benchmarks/parts.py --task banking77 --data DATA/banking77 --output runs/parts/banking77

It writes train.jsonl, validation.jsonl (for checkpoints), tuning.jsonl (for thresholds), certification.jsonl where the
task has enough texts, and reported.jsonl, which is for figures alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cascade_train.tasks import write_examples
from common import TASKS, read_parts, run_command


def main() -> None:
    """Write the files, and print how many texts each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--data", required=True, type=Path, help="folder with the task's files")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    options = parser.parse_args()
    parts = read_parts(options.task, options.data)
    named = {
        "train": parts.data.train,
        "validation": parts.data.validation,
        "tuning": parts.tuning,
        "certification": parts.certification,
        "reported": parts.reported,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, examples in named.items():
        if examples is not None:
            write_examples(options.output / f"{name}.jsonl", examples, parts.data.labels)
            print(f"{name}.jsonl: {len(examples)} texts")


if __name__ == "__main__":
    run_command(main)
