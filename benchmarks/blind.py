"""Answer texts whose labels are elsewhere, with a tuned bundle: the role of GLUE's test server.

    python benchmarks/blind.py --model-dir BUNDLE --texts FOLDER/banking77.txt --built "how it was made"

Writes blind/TASK-BUNDLE.jsonl, one line for each text in order (the cascade's answer, where it left, and what each
member answers alone), and beside it the bundle's manifest without hashes, the machine, and milliseconds per text of the
cascade and of its last member alone, in turn. Nothing about the answers is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from common import RESULTS, race, run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import MANIFEST
from cascade_rt.io.writers import json_line, open_output, write_json
from cascade_rt.tuning.collect import open_whole

TIMED, TIMED_IN_BULK, ROUNDS = 200, 2000, 5  # texts, texts, rounds


def main() -> None:
    """Answer, time and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, required=True, help="the tuned bundle")
    parser.add_argument("--texts", type=Path, required=True, help="one text a line; the task is the file's name")
    parser.add_argument("--name", required=True, help="of the bundle, in the names of the files")
    parser.add_argument("--built", required=True, help="how the bundle was made: its commands")
    parser.add_argument("--output", type=Path, default=RESULTS / "blind", help="folder")
    options = parser.parse_args()
    texts = options.texts.read_text("utf-8").splitlines()
    cascade, whole = CascadeRuntime(options.model_dir, preload=True), open_whole(options.model_dir, preload=True)
    names, task = whole.bundle.labels, whole.task
    logits, _ = whole.member_logits(texts)
    places = {member.name: place for place, member in enumerate(whole.bundle.members)}
    alone = [task.answers(task.probabilities(member)) for member in logits]
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{options.texts.stem}-{options.name}.jsonl"
    with open_output(file) as stream:
        for row, answer in enumerate(cascade.predict(texts)):
            members = [_written(each[row], names, several=task.several) for each in alone]
            label: Any = list(answer.labels) if task.several else answer.label
            place = places[cascade.bundle.members[answer.exit].name]
            fields = {"label": label, "score": answer.score, "exit": place, "members": members}
            stream.write(json_line({}, fields))
    last = whole.bundle.members[-1].name
    timed = race({"cascade": cascade, last: whole.with_members([last])}, last, texts[:TIMED_IN_BULK], TIMED, ROUNDS)
    report = {
        "texts": len(texts),
        "built": options.built,
        "machine": describe(),
        "manifest": _without_hashes(json.loads((options.model_dir / MANIFEST).read_text("utf-8"))),
        "milliseconds_per_text": timed,
    }
    write_json(file.with_suffix(".json"), report)
    print(f"written: {file} and {file.with_suffix('.json').name}")


def _written(answer: Any, names: Sequence[str], *, several: bool) -> Any:
    """Return a class id by its name, or which labels a text has as a list of names."""
    return list(compress(names, answer)) if several else names[answer]


def _without_hashes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_hashes(item) for key, item in value.items() if key not in ("sha256", "digest")}
    return [_without_hashes(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    run_command(main)
