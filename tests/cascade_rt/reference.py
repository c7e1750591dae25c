"""A reference for answers where there is no torch: BERT in numpy and exit rules as plain loops, text by text.

Everything is float64, and none of it shares code with cascade_rt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf
from scipy.special import softmax as expected_softmax
from tokenizers import Encoding, Tokenizer

from ..toy import Member, Weights

Array = NDArray[np.float64]


def tokenized(file: str, texts: Sequence[str | tuple[str, str]], max_length: int = 32) -> list[Encoding]:
    """Return the tokens of each text, cut by the tokenizers library itself, without padding."""
    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    encodings: list[Encoding] = tokenizer.encode_batch(list(texts))
    return encodings


def patience_exit(classes: Sequence[int], patience: int) -> int:
    """Return where one text leaves by the counter of PABEE, as its paper prints it."""
    counter = 0
    for stage, chosen in enumerate(classes):
        counter = counter + 1 if stage and chosen == classes[stage - 1] else 0
        if counter == patience:
            return stage
    return len(classes) - 1


def confidence_exit(confidences: Sequence[float], thresholds: Sequence[float]) -> int:
    """Return where one text leaves by Algorithm 1 of CascadeBERT: strictly above a threshold, else at the last."""
    for stage, threshold in enumerate(thresholds):
        if confidences[stage] > threshold:
            return stage
    return len(confidences) - 1


def hidden_states(weights: Weights, encoding: Encoding) -> list[Array]:
    """Return the states after the embeddings and after each layer, each (tokens, hidden)."""
    states = _Layers(weights)
    return states.run(encoding)


def head(weights: Weights, states: Array) -> Array:
    """Return the class probabilities that pooler and classifier make of the last states."""
    layers = _Layers(weights)
    pooled = np.tanh(layers.dense("bert.pooler.dense", states[0]))
    probabilities: Array = expected_softmax(layers.dense("classifier", pooled))
    return probabilities


def stage_probabilities(members: Sequence[Member], encodings: Sequence[Encoding]) -> Array:
    """Return what each member or segment answers, (members, texts, labels), each model run in one piece.

    A segment's weights are those of its whole model, of which it answers with its own head after its last layer.
    """
    return np.array([[_answer(member, encoding) for encoding in encodings] for member in members])


def _answer(member: Member, encoding: Encoding) -> Array:
    states = hidden_states(member.weights, encoding)
    return head(member.weights, states[member.layers.stop if member.layers else -1])


class _Layers:
    def __init__(self, weights: Weights) -> None:
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self.count = sum(name.endswith("intermediate.dense.bias") for name in weights)

    def dense(self, name: str, values: Array) -> Array:
        product: Array = values @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return product

    def norm(self, name: str, values: Array) -> Array:
        centred = values - values.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        normal: Array = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normal

    def run(self, encoding: Encoding, heads: int = 4) -> list[Array]:
        tables = {
            name: self.weights[f"bert.embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        }
        embedded = tables["word"][encoding.ids] + tables["token_type"][encoding.type_ids]
        states = [self.norm("bert.embeddings.LayerNorm", embedded + tables["position"][: len(encoding.ids)])]
        for index in range(self.count):
            at, before = f"bert.encoder.layer.{index}", states[-1]
            width = before.shape[1] // heads
            query, key, value = (
                self.dense(f"{at}.attention.self.{name}", before).reshape(-1, heads, width).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            attention = expected_softmax(query @ key.swapaxes(1, 2) / math.sqrt(width), axis=-1)
            context = (attention @ value).swapaxes(0, 1).reshape(before.shape)
            after = self.norm(
                f"{at}.attention.output.LayerNorm", before + self.dense(f"{at}.attention.output.dense", context)
            )
            inner = self.dense(f"{at}.intermediate.dense", after)
            inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
            states.append(self.norm(f"{at}.output.LayerNorm", after + self.dense(f"{at}.output.dense", inner)))
        return states
