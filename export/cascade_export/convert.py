"""Checkpoint -> ONNX through Optimum -> fused by ONNX Runtime's transformer optimizer."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from cascade_train.settings import guarded
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from optimum.exporters.onnx import main_export
from optimum.exporters.tasks import TasksManager
from transformers.utils import logging as transformers_logging

from cascade_export.onnx_graph import TOKEN_INPUTS
from cascade_export.segments import Segment
from cascade_export.torch_checkpoint import TorchCheckpoint
from cascade_rt.errors import InputError

_TASK = "text-classification"
_REMEDY = "expected a model of a family that docs/guide/families.md lists; fine-tune one of those"
_OPSET = 18  # what the precisions are written for


def convert(checkpoint: TorchCheckpoint, path: Path) -> dict[str, int]:
    """Write the member's fused fp32 graph, with the weights as they are now, to `path`.

    Returns how often each fused operator occurs in it. Raises InputError for an architecture that cannot be exported.
    """
    _check_exportable(checkpoint)
    with (
        guarded(checkpoint.source, f"a {checkpoint.model_type} cannot be exported to ONNX", _REMEDY),
        TemporaryDirectory(prefix="cascade-export-") as folder,
        _quiet(),
    ):
        checkpoint.model.save_pretrained(Path(folder) / "torch")
        checkpoint.tokenizer.save_pretrained(Path(folder) / "torch")
        main_export(
            str(Path(folder) / "torch"),
            output=folder,
            task=_TASK,
            device="cpu",
            dtype="fp32",
            library_name="transformers",
            trust_remote_code=False,
            pad_token_id=checkpoint.tokenizer.pad_token_id or 0,  # else it opens the tokenizer by its own rules
            do_validation=False,  # the finished, fused graph is verified, not this one
            no_post_process=True,
        )
        _check_inputs(checkpoint, Path(folder) / "model.onnx")
        return _fuse(Path(folder) / "model.onnx", path, checkpoint.config)


def _check_inputs(checkpoint: TorchCheckpoint, file: Path) -> None:
    names = {node.name for node in onnx.load(file, load_external_data=False).graph.input}
    if others := sorted(names - set(TOKEN_INPUTS)):
        raise InputError(
            f"{checkpoint.source}: a {checkpoint.model_type} also takes {', '.join(others)}, which the runtime does "
            f"not have; {_REMEDY}"
        )


def _check_exportable(checkpoint: TorchCheckpoint) -> None:
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            checkpoint.model_type, "onnx", library_name="transformers"
        )
    except KeyError:  # it does not know the architecture
        tasks = {}
    if _TASK not in tasks:
        raise InputError(
            f"{checkpoint.source}: found a {checkpoint.model_type}, which Optimum does not export to ONNX for text "
            f"classification; {_REMEDY}"
        )


def convert_segment(segment: Segment, path: Path, tokens: int) -> dict[str, int]:
    """Write a segment's fused fp32 graph to `path`; `tokens`: length of the example that is traced.

    Returns how often each fused operator occurs in it.
    """
    names, values = zip(*segment.example(tokens).items(), strict=True)
    outputs = ["logits", "last_hidden_state"][: 1 + segment.leaves_hidden_states]
    shape = {0: "rows", 1: "tokens"}
    axes = dict.fromkeys(names, shape) | {"logits": {0: "rows"}, "last_hidden_state": shape}
    with TemporaryDirectory(prefix="cascade-export-") as folder, _quiet(), torch.inference_mode():
        torch.onnx.export(
            segment,
            values,
            str(Path(folder) / "model.onnx"),
            input_names=list(names),
            output_names=outputs,
            dynamic_axes={name: axes[name] for name in [*names, *outputs]},
            opset_version=_OPSET,
            dynamo=False,
        )
        return _fuse(Path(folder) / "model.onnx", path, segment.config)


def _fuse(source: Path, target: Path, config: Any) -> dict[str, int]:
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
        if node.op_type != "SkipLayerNormalization" or len(node.output) > 1:
            model.graph.node.append(node)
            continue
        tokens, skip, weight, shift, *bias = node.input
        name = node.output[0]
        for index, term in enumerate([*bias, skip]):
            model.graph.node.append(helper.make_node("Add", [tokens, term], [f"{name}_sum{index}"]))
            tokens = f"{name}_sum{index}"
        epsilon = next(helper.get_attribute_value(item) for item in node.attribute if item.name == "epsilon")
        model.graph.node.append(
            helper.make_node("LayerNormalization", [tokens, weight, shift], [name], axis=-1, epsilon=epsilon)
        )
