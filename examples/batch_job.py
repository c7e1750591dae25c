"""Classify a text file, one text a line, with several processes; JSON lines out, in the order of the input.

python examples/batch_job.py runs/demo/bundle texts.txt answers.jsonl --processes 2

The runtime is pickled to each process, which opens the bundle itself, with one thread. Chunks are read only as they are
needed, so memory stays constant.
"""

import argparse
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from cascade_rt import CascadeRuntime

_runtimes: list[CascadeRuntime] = []  # one in each worker process, none in the main process


def main() -> None:
    """Share the chunks of the input among processes, and write their answers in order."""
    parser = argparse.ArgumentParser(description="Classify a text file with several processes.")
    parser.add_argument("bundle")
    parser.add_argument("input", type=Path, help="one text a line")
    parser.add_argument("output", type=Path, help="one JSON object a line")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--chunk-size", type=int, default=1024, help="texts per task (default: 1024)")
    args = parser.parse_args()

    runtime = CascadeRuntime(args.bundle, threads=1)  # checks the bundle; loads no model in this process
    with (
        args.input.open(encoding="utf-8") as texts,
        args.output.open("w", encoding="utf-8") as output,
        # spawn works on every system, and copies no threads of ONNX Runtime as fork does.
        ProcessPoolExecutor(args.processes, get_context("spawn"), start, (runtime,)) as pool,
    ):
        running: deque[Future[list[str]]] = deque()
        for chunk in chunks(texts, args.chunk_size):
            running.append(pool.submit(classify, chunk))
            if len(running) > 2 * args.processes:  # enough that no process waits
                output.writelines(running.popleft().result())
        for future in running:
            output.writelines(future.result())


def chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of up to `size` lines, without their line ends."""
    stripped = (line.rstrip("\n") for line in lines)
    while chunk := list(islice(stripped, size)):
        yield chunk


def start(runtime: CascadeRuntime) -> None:
    """Keep the runtime that a worker process received."""
    _runtimes.append(runtime)


def classify(texts: list[str]) -> list[str]:
    """Classify texts in a worker process; return one line of JSON for each."""
    (runtime,) = _runtimes
    return [
        json.dumps({"label": found.label, "score": found.score, "exit": found.exit}) + "\n"
        for found in runtime.predict(texts)
    ]


if __name__ == "__main__":
    main()
