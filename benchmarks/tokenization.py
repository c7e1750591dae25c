"""Tokenization with and without the ids of words seen before: `TextTokenizer` both ways, in turn.

python benchmarks/tokenization.py --model-dir BUNDLE --data FILE [--label-column NAME]

Bulk is one call with all texts: the library uses as many threads as there are cores, the word cache one. "New words" is
a bulk call of a cache that is still empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from common import RESULTS, run_command

from cascade_rt import read_bundle
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.io.writers import write_json

_ROUNDS = 15


def main() -> None:
    """Compare, print, write the JSON."""
    options = _parser().parse_args()
    bundle = read_bundle(options.model_dir)
    reading = Reading(label_column=options.label_column)
    texts = [str(one.text) for one in read_examples(options.data, pair=False, reading=reading)][: options.texts]

    def tokenizer(*, word_cache: bool) -> TextTokenizer:
        file = (bundle.folder or Path()) / bundle.tokenizer_file
        return TextTokenizer(file, bundle.max_length, bundle.pair, word_cache=word_cache)

    words, library = tokenizer(word_cache=True), tokenizer(word_cache=False)
    started = perf_counter()
    taken = words.encode(texts).from_words
    cold = perf_counter() - started
    ways: dict[str, Callable[[Sequence[str]], list[Encoded]]] = {
        "library, alone": lambda some: [library.encode([text]) for text in some],
        "library, bulk": lambda some: [library.encode(some)],
        "words, alone": lambda some: [words.encode([text]) for text in some],
        "words, bulk": lambda some: [words.encode(some)],
    }
    timed = in_turns(ways, [texts], _ROUNDS)
    microseconds = {name: 1e6 * np.sort(one.seconds[:, 0]) / len(texts) for name, one in timed.items()}
    report = {
        "machine": describe(),
        "texts": len(texts),
        "from_words": taken,
        "new_words_us": 1e6 * cold / len(texts),
        "us_per_text": {name: one.tolist() for name, one in microseconds.items()},
    }
    output: Path = options.output or RESULTS / "tokenization.json"
    write_json(output, report)
    print(f"{taken} of {len(texts)} texts from words; {report['new_words_us']:.1f} us a text with new words")
    for name, one in microseconds.items():
        print(f"{name:16} {np.median(one):6.1f} us a text ({one[0]:.1f} to {one[-1]:.1f})")
    for kind in ("alone", "bulk"):
        ratios = timed[f"library, {kind}"].seconds / timed[f"words, {kind}"].seconds
        print(f"{kind}: {np.median(ratios):.1f}x as fast ({ratios.min():.1f} to {ratios.max():.1f} in the rounds)")
    print(f"written: {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-dir", required=True, metavar="BUNDLE")
    add("--data", type=Path, required=True, metavar="FILE", help="texts")
    add("--label-column", help="its column of labels")
    add("--texts", type=int, default=3080, help="so many of them (default: 3080)")
    add("--output", type=Path, metavar="FILE", help="the report (default: benchmarks/results/tokenization.json)")
    return parser


if __name__ == "__main__":
    run_command(main)
