"""A torch member as ONNX files: converted and compared with torch once, then written in each precision asked for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cascade_train.averaging import AveragingForSequenceClassification

from cascade_export.averaging import PRECISIONS, write_network
from cascade_export.check import Check, CheckData, Probabilities, reference
from cascade_export.convert import convert
from cascade_export.precision import WRITERS, write_precision
from cascade_export.temperature import divide_logits, fit_temperature
from cascade_export.torch_checkpoint import TorchCheckpoint
from cascade_export.verify import check_texts, torch_probabilities, verify
from cascade_export.vocabulary import Vocabulary, trim_graph
from cascade_export.weights import move_weights
from cascade_rt.bundle.precisions import PRECISIONS as ALL_PRECISIONS
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.tuning.metrics import ece
from cascade_rt.types import Text

_ROUNDING_TEXTS = 512


class TorchFiles:
    """The files of a torch member, each made when it is first copied."""

    usual = "fp32"

    def __init__(
        self,
        checkpoint: TorchCheckpoint,
        tokenizer: TextTokenizer,
        data: CheckData | None,
        work: Path,
        check: Check,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Convert to fp32 in the folder `work`, calibrated on `data` if wanted; raise CascadeError if torch differs.

        `tokenizer`: the bundle's, with `vocabulary` where that is not the checkpoint's own.
        """
        scaled = _calibrate(checkpoint, data) if check.calibrate else {}
        self._checkpoint = checkpoint
        self._source = work / f"{checkpoint.name}.onnx"
        self._network = checkpoint.model if isinstance(checkpoint.model, AveragingForSequenceClassification) else None
        self.precisions = tuple(WRITERS if self._network is None else PRECISIONS)
        if self._network is None:
            made = {"fused": convert(checkpoint, self._source, check.exporter)}
        else:
            write_network(self._network, self._source, "fp32")
            made = {"averaging_network": self._network.config.network}
        texts = check_texts(checkpoint)
        whole = tokenizer if vocabulary is None else _whole(checkpoint, work)
        difference = verify(checkpoint, reference(checkpoint, self._source), whole, texts)
        self._vocabulary = vocabulary
        self.removed = 0
        if vocabulary is not None and self._network is None:
            self.removed = trim_graph(self._source, vocabulary.own_ids, checkpoint.max_length)
        elif vocabulary is not None and self._network is not None:
            size = self._network.config
            self.removed = (size.vocab_size - len(vocabulary.own_ids)) * size.hidden_size
        some = data.texts[:: len(data.texts) // _ROUNDING_TEXTS or 1] if data else texts
        self._like = tokenizer.encode(some[:_ROUNDING_TEXTS])
        aligned = {"alignment": checkpoint.alignment} if checkpoint.alignment else {}
        self.facts = {**made, "max_probability_difference": difference, **aligned, **scaled}

    def copy(self, precision: str, folder: Path) -> tuple[str, list[str]]:
        """Copy the file of a precision, made now if it was not, into a bundle's folder; return its path there."""
        vocabulary = self._vocabulary
        made = self._source.with_name(f"{precision}-{self._source.name}")
        if not made.exists() and self._network is not None:
            write_network(self._network, made, precision, None if vocabulary is None else vocabulary.own_ids)
        elif not made.exists():
            write_precision(self._source, made, precision, self._like)
        file = folder / self._source.name
        shutil.copyfile(made, file)
        return file.name, move_weights(file)

    def weight_bits(self, precision: str) -> int:
        """Return the bits of the weights of products in a precision of bytes."""
        return ALL_PRECISIONS[precision].weight_bits

    def original(self, texts: Sequence[Text], _: TextTokenizer) -> Probabilities:
        """Return torch's probabilities, with the member's own tokenizer, float64 (texts, labels)."""
        return torch_probabilities(self._checkpoint.original or self._checkpoint, texts)


def _whole(checkpoint: TorchCheckpoint, work: Path) -> TextTokenizer:
    """Return the checkpoint's tokenizer with all of its tokens."""
    checkpoint.write_tokenizer(work / "tokenizer.json")
    return TextTokenizer(work / "tokenizer.json", checkpoint.max_length, checkpoint.pair)


def _calibrate(checkpoint: TorchCheckpoint, data: CheckData | None) -> dict[str, Any]:
    """Scale the checkpoint's logits by the temperature that fits the check data; return it for the manifest."""
    if checkpoint.task.several:
        raise InvalidOption("calibrate", True, "False with several labels: their cuts are of these probabilities")
    if data is None or data.labels is None:
        raise InputError(f"member {checkpoint.name!r}: found no labelled data to calibrate on; give check data")
    before = torch_probabilities(checkpoint, data.texts)
    logits = np.log(np.maximum(before, 1e-30))
    temperature = fit_temperature(logits, data.labels)
    divide_logits(checkpoint.model, temperature)
    if checkpoint.original:
        divide_logits(checkpoint.original.model, temperature)
    after = checkpoint.task.probabilities(logits / temperature)
    correct = before.argmax(axis=1) == data.labels
    return {
        "temperature": {
            "value": temperature,
            "texts": len(correct),
            "ece": {
                "before": ece(correct, checkpoint.task.confidence(before)),
                "after": ece(correct, checkpoint.task.confidence(after)),
            },
        }
    }
