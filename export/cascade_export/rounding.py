"""int8 weights that stay close to the fp32 ones on given texts, at hardly any cost when the member runs.

Two published methods, one after the other. Smoothing: channels of activations with outliers are scaled down, and the
weights that multiply them up, so that neither needs a wide range (SmoothQuant, Xiao et al., 2023, equation 4).
Compensation: weights are rounded one input channel after the other, and each error is made up for by the channels that
are not rounded yet (GPTQ, Frantar et al., 2023, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

Floats = NDArray[np.float32]

LARGEST = 127  # of a symmetric int8
LARGEST_EXACT = 64
"""The largest weight whose products never saturate: without VNNI, x86 adds pairs of those with 255 in 16 bits."""
_DAMPING = 0.01  # of the compensation, as in GPTQ
_BLOCK = 64  # channels whose errors reach the others together
_SMALLEST = 1e-5


@dataclass
class Inputs:
    """Inputs of matrix products with the same weights, over many tokens."""

    lowest: Floats
    """The lowest value of each channel, and at most 0, shape (width,)."""
    highest: Floats
    """The highest value of each channel, and at least 0, shape (width,)."""
    products: Floats
    """Sum over tokens of the products of two channels, shape (width, width)."""
    tokens: int

    def add(self, rows: Floats) -> None:
        """Add tokens, shape (tokens, width)."""
        self.lowest = np.minimum(self.lowest, rows.min(axis=0, initial=0))
        self.highest = np.maximum(self.highest, rows.max(axis=0, initial=0))
        self.products += rows.T @ rows
        self.tokens += len(rows)


def dimensions(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, int]:
    """Return how many dimensions tensors of a model have, from a run on three texts of three tokens."""
    session = _session(model, tensors)
    text = {}
    for tensor in session.get_inputs():  # ids, and where a segment reads them hidden states
        shape = [size if isinstance(size, int) else 3 for size in tensor.shape]
        text[tensor.name] = np.zeros(shape, dtype=np.int64 if "int64" in tensor.type else np.float32)
    return {name: value.ndim for name, value in zip(tensors, session.run(None, text), strict=True)}


def measure_inputs(
    model: onnx.ModelProto, read_by: Mapping[str, tuple[str, ...]], batches: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[tuple[str, ...], Inputs]:
    """Run a model on padded micro-batches, and return what its products with constant weights read.

    `read_by`: for each tensor, the weights that multiply it; the answer is by these weights.
    """
    session = _session(model, list(read_by))
    names = [tensor.name for tensor in session.get_inputs()]
    found: dict[tuple[str, ...], Inputs] = {}
    for batch in batches:
        mask = batch["attention_mask"].astype(bool)
        for weights, values in zip(
            read_by.values(), session.run(None, {name: batch[name] for name in names}), strict=True
        ):
            rows = values[mask] if values.shape[:2] == mask.shape else values.reshape(-1, values.shape[-1])
            if weights not in found:
                width = rows.shape[1]
                none = np.zeros(width, np.float32)
                found[weights] = Inputs(none, none, np.zeros((width, width), np.float32), 0)
            found[weights].add(rows)
    return found


def _session(model: onnx.ModelProto, outputs: Sequence[str]) -> onnxruntime.InferenceSession:
    """Return a session that gives these float tensors."""
    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    del measured.graph.output[:]
    measured.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(measured.SerializeToString(), options, providers=["CPUExecutionProvider"])


def smoothing(inputs: Inputs, weights: Sequence[Floats], strength: float) -> Floats:
    """Return by what each channel of the inputs is divided, shape (width,), before it meets these weights.

    `strength`: 0 leaves activations as they are, 1 gives all their channels the same range.
    """
    reach = np.maximum(np.max([np.abs(matrix).max(axis=1) for matrix in weights], axis=0), _SMALLEST)
    largest = np.maximum(inputs.highest, -inputs.lowest)
    factors: Floats = np.maximum(largest, _SMALLEST) ** strength / reach ** (1 - strength)
    factors[largest <= _SMALLEST] = 1
    factors /= np.exp(np.log(factors).mean())
    return factors


def steps_of(weights: Floats, axis: int, largest: int = LARGEST) -> Floats:
    """Return the scale of integers up to `largest` along `axis`, which is kept with size 1; 1 where all are 0."""
    steps: Floats = np.abs(weights).max(axis=axis, keepdims=True) / np.float32(largest)
    steps[steps == 0] = 1
    return steps


def rounded(values: NDArray[Any], largest: int = LARGEST) -> NDArray[np.int8]:
    """Return the nearest integer of each value, from -`largest` to `largest`."""
    integers: NDArray[np.int8] = np.clip(np.rint(values), -largest, largest).astype(np.int8)
    return integers


def compensated(weights: Floats, steps: Floats, products: Floats, largest: int = LARGEST) -> NDArray[np.int8]:
    """Round weights (width, outputs) to multiples of `steps` (1, outputs) so that their products change little.

    `largest`: of the integers. `products`: as of `Inputs`, of what the weights multiply, shape (width, width).
    """
    width = len(weights)
    left = (weights / steps).astype(np.float64)
    damped = products + _DAMPING * np.diag(products).mean(dtype=np.float64) * np.eye(width)
    spread = np.linalg.cholesky(np.linalg.inv(damped)).T
    integers = np.empty(weights.shape, dtype=np.int8)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = np.empty((end - start, weights.shape[1]))
        for channel in range(start, end):
            integers[channel] = rounded(left[channel], largest)
            errors[channel - start] = (left[channel] - integers[channel]) / spread[channel, channel]
            left[channel + 1 : end] -= np.outer(spread[channel, channel + 1 : end], errors[channel - start])
        left[end:] -= spread[start:end, end:].T @ errors
    return integers
