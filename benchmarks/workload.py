"""What the benchmarks run on: texts from a file or made up, and operating points for wanted speed-ups."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

from cascade_rt import Bundle, CascadeRuntime
from cascade_rt.gate import confidence, softmax
from cascade_rt.records import Text, read_examples
from cascade_rt.thresholds import threshold_for_speedup


def texts_for(model_dir: Path, bundle: Bundle, data: Path | None, words: str, count: int, seed: int = 0) -> list[Text]:
    """Return `count` texts in random order: from `data`, or made of the tokenizer's words.

    `words` is "MEAN:SD", the (log-normal) distribution of words per made-up text.
    """
    draw = random.Random(seed)
    if data is not None:
        texts = [example.text for example in read_examples(data, pair=bundle.pair)]
        draw.shuffle(texts)
        return (texts * -(-count // len(texts)))[:count]
    pieces = Tokenizer.from_file(str(model_dir / bundle.tokenizer_file)).get_vocab()
    vocabulary = sorted(piece for piece in pieces if len(piece) > 1 and piece.isalpha())
    mean, deviation = map(float, words.split(":"))

    def text() -> str:
        length = max(1, round(mean * draw.lognormvariate(0, deviation / mean)))
        return " ".join(draw.choices(vocabulary, k=length))

    return [(text(), text()) if bundle.pair else text() for _ in range(count)]


def reachable(bundle: Bundle, wanted: list[float]) -> list[float]:
    """Return the layer speed-ups below what the first member alone has."""
    fastest = bundle.members[-1].layers / bundle.members[0].layers
    return [speedup for speedup in wanted if speedup < fastest]


def taus_for(runtime: CascadeRuntime, texts: list[Text], speedups: list[float]) -> dict[float, float]:
    """Choose the tau that reaches each layer speed-up on these texts."""
    logits, _ = runtime.member_logits(texts)
    confidences = confidence(softmax(logits))
    return {speedup: threshold_for_speedup(runtime.bundle.members, confidences, speedup) for speedup in speedups}
