"""Checkpoint -> ONNX by torch's tracing exporter, or by Optimum -> fused by ONNX Runtime's transformer optimizer.

Its fusions know the graphs that tracing makes of eager attention. torch's other exporter, dynamo, makes graphs of the
same models in which they find none (docs/design.md).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from cascade_train.compat import MAJOR
from cascade_train.settings import guarded
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from cascade_export.checkpoint import OPTIMUM, SENTENCES, TRACE
from cascade_export.fusion import fuse_rotary
from cascade_export.segments import Segment
from cascade_export.torch_checkpoint import TorchCheckpoint
from cascade_rt.errors import MissingExtraError

_REMEDY = "expected a model of a family that docs/guide/families.md lists; fine-tune one of those"
_RAW = "model.onnx"  # the file that an exporter writes
_OPSET = 18  # what the precisions are written for
_SKIPS = {  # to what it is without the addition, and whether that has a shift
    "SkipLayerNormalization": ("LayerNormalization", True),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", False),
}
_TRACED = SENTENCES[1:4]  # of different lengths, so that some are padded


def convert(checkpoint: TorchCheckpoint, path: Path, exporter: str = TRACE) -> dict[str, int]:
    """Write the member's fused fp32 graph, with the weights as they are now, to `path`.

    Returns how often each fused operator occurs in it. Raises InputError for an architecture that cannot be exported,
    and MissingExtraError where the exporter, one of EXPORTERS, is not installed.
    """
    write = {TRACE: _by_tracing, OPTIMUM: _by_optimum}[exporter]
    action = f"a {checkpoint.model_type} cannot be exported to ONNX" + (" by Optimum" if exporter == OPTIMUM else "")
    with guarded(checkpoint.source, action, _REMEDY), _scratch() as folder:
        example = _example(checkpoint)
        write(checkpoint, example, folder)
        return _fuse(folder / _RAW, path, checkpoint.config, example)


def _example(checkpoint: TorchCheckpoint) -> dict[str, Tensor]:
    """Return what the model takes, of some texts."""
    encoded = checkpoint.backend.encode_batch(list(_TRACED))
    values = {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }
    if "token_type_ids" in signature(checkpoint.model.forward).parameters:
        values["token_type_ids"] = torch.zeros_like(values["input_ids"])
    return values


def _by_tracing(checkpoint: TorchCheckpoint, example: Mapping[str, Tensor], folder: Path) -> None:
    _trace(_Classifier(checkpoint.model), example, ["logits"], folder)


def _by_optimum(checkpoint: TorchCheckpoint, _: Mapping[str, Tensor], folder: Path) -> None:
    try:
        if MAJOR > 4:
            raise ImportError(f"it needs transformers 4, found {version('transformers')}")
        from optimum.exporters.onnx import onnx_export_from_model  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise MissingExtraError("the exporter optimum", "optimum", error) from error
    onnx_export_from_model(
        checkpoint.model,
        folder,
        task="text-classification",
        opset=_OPSET,
        no_post_process=True,
        do_validation=False,  # the finished, fused graph is verified, not this one
    )


def convert_segment(segment: Segment, path: Path, tokens: int) -> dict[str, int]:
    """Write a segment's fused fp32 graph to `path`; `tokens`: length of the example that is traced.

    Returns how often each fused operator occurs in it.
    """
    outputs = ["logits", "last_hidden_state"][: 1 + segment.leaves_hidden_states]
    with _scratch() as folder:
        example = segment.example(tokens)
        _trace(segment, example, outputs, folder)
        return _fuse(folder / _RAW, path, segment.config, example)


class _Classifier(nn.Module):  # type: ignore[misc]  # the library has no types
    """A classifier whose inputs have a fixed order, and whose only output is logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def _trace(module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], folder: Path) -> None:
    """Trace a module on an example, by input name, and write the graph to `folder`."""
    shape = {0: "rows", 1: "tokens"}
    axes = dict.fromkeys(example, shape) | {"logits": {0: "rows"}, "last_hidden_state": shape}
    torch.onnx.export(
        module.eval(),
        tuple(example.values()),
        str(folder / _RAW),
        input_names=list(example),
        output_names=list(outputs),
        dynamic_axes={name: axes[name] for name in [*example, *outputs]},
        opset_version=_OPSET,
        dynamo=False,
    )


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
def _scratch() -> Iterator[Path]:
    """Make a folder for the graph that an exporter writes; silence exporters, which warn about their own internals."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            torch.inference_mode(),
            TemporaryDirectory(prefix="cascade-export-") as folder,
        ):
            warnings.simplefilter("ignore")
            yield Path(folder)
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
