"""An ONNX classifier that another tool made, tried on token ids: does it take and give what the runtime needs?"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cascade_rt.bundle.manifest import BATCH_TOLERANCE
from cascade_rt.bundle.onnx_file import scan
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import InputError, first_line

_TASK = SingleLabel()

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs that the runtime has for a graph; the first is required."""

_SHAPES = ((1, 5), (3, 9), (2, 4))  # texts, tokens
_TRIED = 64  # random texts
_SUM = 1e-3  # by which probabilities may miss 1
_AGAIN = "export it again, for instance with optimum-cli export onnx --task text-classification"
_PASSED_ON = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip"}
_SIGMOID = {"Sigmoid", "HardSigmoid"}


class OnnxGraph:
    """A graph with a session on the CPU; each check raises InputError, which names the file and what is wrong."""

    def __init__(self, path: Path) -> None:
        """Load the file."""
        self._path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it ({first_line(error)}); {_AGAIN}") from error
        self._names = [node.name for node in self._session.get_inputs()]

    @property
    def takes_types(self) -> bool:
        """True if it has an input for token types."""
        return TOKEN_INPUTS[2] in self._names

    def check(self, labels: int) -> None:
        """Check inputs, outputs, and that rows of any number and length give logits, (rows, labels)."""
        self._check_inputs()
        for shape in _SHAPES:
            self._check_run(shape, labels)
        drawn = np.random.default_rng(0).integers(0, self._ids, (_TRIED, 9))
        logits = self._run(drawn)
        if not np.isfinite(logits).all():
            raise InputError(f"{self._path}: answers NaN or infinity; expected logits; {_AGAIN}")
        if function := self._function(logits):
            raise InputError(
                f"{self._path}: answers probabilities ({function} in the graph), expected logits, of which "
                f"cascade-rt makes probabilities itself; {_AGAIN}, without that operator"
            )
        self._check_padding(drawn)

    def positions(self, says: int, reserved: int) -> int:
        """Return how many tokens it takes: RoBERTa-like models take fewer than config.json `says`, by `reserved`."""
        for tokens in (says, says - reserved):
            try:
                self._run(np.full((1, tokens), reserved, dtype=np.int64))  # any token but padding
            except Exception:
                continue
            return tokens
        raise InputError(
            f"{self._path}: cannot run {says - reserved} tokens, as config.json's max_position_embeddings promises; "
            "correct that number"
        )

    def check_tokens(self, backend: Tokenizer, pair: bool) -> None:
        """Check that it has an embedding for each id of the tokenizer, and for each token type."""
        token, largest = max(backend.get_vocab().items(), key=lambda item: item[1])
        try:
            self._run(np.full((1, 3), largest, dtype=np.int64))
        except Exception as error:
            raise InputError(
                f"{self._path}: has no embedding for {token!r}, token {largest} of tokenizer.json "
                f"({first_line(error)}); expected the tokenizer that the model was trained with"
            ) from error
        types = max(backend.encode("a", "b" if pair else None).type_ids, default=0)
        try:
            self._run(np.zeros((1, 3), dtype=np.int64), types)
        except Exception as error:
            raise InputError(
                f"{self._path}: has no embedding for the token type {types}, which tokenizer.json gives "
                f"({first_line(error)}); expected the tokenizer that the model was trained with"
            ) from error

    def _check_inputs(self) -> None:
        found = {node.name: node for node in self._session.get_inputs()}
        others = [name for name in found if name not in TOKEN_INPUTS]
        if others or TOKEN_INPUTS[0] not in found:
            raise InputError(
                f"{self._path}: has the inputs {', '.join(found)}; expected input_ids and no others than "
                f"attention_mask and token_type_ids{_advice(others)}; {_AGAIN}"
            )
        if wrong := [f"{name} as {node.type}" for name, node in found.items() if node.type != "tensor(int64)"]:
            raise InputError(f"{self._path}: takes {', '.join(wrong)}; expected token ids as tensor(int64); {_AGAIN}")
        for name, node in found.items():
            if len(node.shape) != 2 or any(isinstance(size, int) for size in node.shape):
                raise InputError(
                    f"{self._path}: takes {name} in the shape {node.shape}; expected any number of texts and tokens; "
                    f"{_AGAIN}, which has dynamic axes"
                )

    def _check_run(self, shape: tuple[int, int], labels: int) -> None:
        try:
            found = self._run(np.zeros(shape, dtype=np.int64)).shape
        except Exception as error:
            raise InputError(
                f"{self._path}: cannot run {shape[0]} texts of {shape[1]} tokens ({first_line(error)}); expected any "
                f"number of texts and tokens; {_AGAIN}, which has dynamic axes"
            ) from error
        expected = (shape[0], labels)
        if found == expected:
            return
        if len(found) > 2:
            answers = "for each token, as classifiers of tokens, language models and encoders do"
        elif found == (shape[0], 1):
            answers = "with one score, as rerankers and regressions do"
        else:
            answers = f"{self._output} of shape {found}, expected {expected}, for token ids of shape {shape}"
        raise InputError(
            f"{self._path}: answers {answers}; expected logits of the {labels} labels of config.json for each text; "
            f"correct id2label there, or {_AGAIN}"
        )

    def _check_padding(self, ids: NDArray[np.int64]) -> None:
        """Without a mask, padding is read as text."""
        if TOKEN_INPUTS[1] in self._names:
            return
        padded = np.pad(ids, ((0, 0), (0, 4)))
        if np.abs(_TASK.probabilities(self._run(padded)) - _TASK.probabilities(self._run(ids))).max() > BATCH_TOLERANCE:
            raise InputError(
                f"{self._path}: has no input attention_mask, and answers padded texts otherwise; expected one; {_AGAIN}"
            )

    def _function(self, logits: NDArray[np.float32]) -> str | None:
        """Return the function that the graph ends in, if it gives probabilities."""
        if logits.min() < 0 or logits.max() > 1:
            return None
        if np.abs(logits.sum(axis=1) - 1).max() <= _SUM:
            return "softmax"
        made, name = scan(self._path).made, self._output
        while name in made and made[name][0] in _PASSED_ON:
            name = made[name][1]
        return "sigmoid" if name in made and made[name][0] in _SIGMOID else None

    @cached_property
    def _output(self) -> str:
        names = [node.name for node in self._session.get_outputs()]
        return "logits" if "logits" in names else str(names[0])

    @cached_property
    def _ids(self) -> int:
        """Return the number of the first token ids that it knows, of up to 1,000."""
        known = 1000
        while known > 1:
            try:
                self._run(np.full((1, 3), known - 1, dtype=np.int64))
            except Exception:
                known //= 2
            else:
                break
        return known

    def _run(self, ids: NDArray[Any], types: int = 0) -> NDArray[np.float32]:
        values = {TOKEN_INPUTS[0]: ids, TOKEN_INPUTS[1]: np.ones_like(ids), TOKEN_INPUTS[2]: np.full_like(ids, types)}
        (answer,) = self._session.run([self._output], {name: values[name] for name in self._names})
        return np.asarray(answer)


def _advice(others: list[str]) -> str:
    if any("position" in name for name in others):
        return " (positions are counted in the graph)"
    return " (rename the others)" if others else ""
