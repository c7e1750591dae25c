"""Checkpoint -> ONNX by torch's tracing exporter -> fused by ONNX Runtime's transformer optimizer.

Its fusions know the graphs that tracing makes of eager attention. torch's other exporter, dynamo, makes graphs of the
same models in which they find none.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from cascade_train.settings import guarded
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from cascade_export.checkpoint import SENTENCES
from cascade_export.fusion import fuse_rotary
from cascade_export.segments import Segment
from cascade_export.torch_checkpoint import TorchCheckpoint

_REMEDY = "expected a model of a family that docs/guide/families.md lists; fine-tune one of those"
_OPSET = 18  # what the precisions are written for
_SKIPS = {  # to what it is without the addition, and whether that has a shift
    "SkipLayerNormalization": ("LayerNormalization", True),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", False),
}
_TRACED = SENTENCES[1:4]  # of different lengths, so that some are padded


def convert(checkpoint: TorchCheckpoint, path: Path) -> dict[str, int]:
    """Write the member's fused fp32 graph, with the weights as they are now, to `path`.

    Returns how often each fused operator occurs in it. Raises InputError for an architecture that cannot be exported.
    """
    encoded = checkpoint.backend.encode_batch(list(_TRACED))
    values = {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }
    if "token_type_ids" in signature(checkpoint.model.forward).parameters:
        values["token_type_ids"] = torch.zeros_like(values["input_ids"])
    with guarded(checkpoint.source, f"a {checkpoint.model_type} cannot be exported to ONNX", _REMEDY):
        return _convert(_Classifier(checkpoint.model), values, ["logits"], path, checkpoint.config)


def convert_segment(segment: Segment, path: Path, tokens: int) -> dict[str, int]:
    """Write a segment's fused fp32 graph to `path`; `tokens`: length of the example that is traced.

    Returns how often each fused operator occurs in it.
    """
    outputs = ["logits", "last_hidden_state"][: 1 + segment.leaves_hidden_states]
    return _convert(segment, segment.example(tokens), outputs, path, segment.config)


class _Classifier(nn.Module):  # type: ignore[misc]  # the library has no types
    """A classifier whose inputs have a fixed order, and whose only output is logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def _convert(
    module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], path: Path, config: Any
) -> dict[str, int]:
    """Trace a module on an example, by input name, and fuse the graph; return how often each fused operator occurs."""
    shape = {0: "rows", 1: "tokens"}
    axes = dict.fromkeys(example, shape) | {"logits": {0: "rows"}, "last_hidden_state": shape}
    with TemporaryDirectory(prefix="cascade-export-") as folder, _quiet(), torch.inference_mode():
        torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            str(Path(folder) / "model.onnx"),
            input_names=list(example),
            output_names=list(outputs),
            dynamic_axes={name: axes[name] for name in [*example, *outputs]},
            opset_version=_OPSET,
            dynamo=False,
        )
        return _fuse(Path(folder) / "model.onnx", path, config, example)


def _fuse(source: Path, target: Path, config: Any, example: Mapping[str, Tensor]) -> dict[str, int]:
    fusions = FusionOptions("bert")  # of all BERT-like encoders
    fusions.enable_embed_layer_norm = False  # it hides the tables, and takes more inputs than some models have
    optimized = optimize_model(
        str(source),
        model_type="bert",
        optimization_options=fusions,
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    fuse_rotary(optimized, config.num_attention_heads, {name: values.numpy() for name, values in example.items()})
    _take_layer_norms_apart(optimized.model)
    optimized.save_model_to_file(str(target))
    return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which warn about their own internals."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(verbosity)


def _take_layer_norms_apart(model: onnx.ModelProto) -> None:
    """Write the fused addition, bias and normalization as the operators that they are.

    The normalizations are found by what they were fused to, but ONNX Runtime's CPU kernel for it takes longer than
    those for its parts (docs/guide/benchmarks.md).
    """
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type not in _SKIPS:
            model.graph.node.append(node)
            continue
        kind, shifted = _SKIPS[node.op_type]
        tokens, skip, *weights = node.input
        weights, bias = weights[: 1 + shifted], weights[1 + shifted :]
        name, *_, whole = [*node.output, f"{node.output[0]}_sum"] if len(node.output) == 1 else node.output
        for output, term in zip([*(f"{name}_sum_of_bias" for _ in bias), whole], [*bias, skip], strict=True):
            model.graph.node.append(helper.make_node("Add", [tokens, term], [output]))
            tokens = output
        epsilon = next(helper.get_attribute_value(item) for item in node.attribute if item.name == "epsilon")
        model.graph.node.append(helper.make_node(kind, [tokens, *weights], [name], axis=-1, epsilon=epsilon))
