"""Checkpoint -> ONNX through Optimum -> fused by ONNX Runtime's transformer optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from optimum.exporters.onnx import main_export
from transformers.utils import logging

from cascade_export.torch_checkpoint import TorchCheckpoint


def convert(checkpoint: TorchCheckpoint, path: Path) -> dict[str, int]:
    """Write the member's fused fp32 graph, with the weights as they are now, to `path`.

    Returns how often each fused operator occurs in it.
    """
    with TemporaryDirectory(prefix="cascade-export-") as folder, _quiet():
        checkpoint.model.save_pretrained(Path(folder) / "torch")
        checkpoint.tokenizer.save_pretrained(Path(folder) / "torch")
        main_export(
            str(Path(folder) / "torch"),
            output=folder,
            task="text-classification",
            device="cpu",
            dtype="fp32",
            library_name="transformers",
            do_validation=False,  # the finished, fused graph is verified, not this one
            no_post_process=True,
        )
        fusions = FusionOptions("bert")  # of all BERT-like encoders
        fusions.enable_embed_layer_norm = False  # it hides the tables, and takes more inputs than some models have
        optimized = optimize_model(
            str(Path(folder) / "model.onnx"),
            model_type="bert",
            optimization_options=fusions,
            num_heads=checkpoint.config.num_attention_heads,
            hidden_size=checkpoint.config.hidden_size,
            opt_level=0,
        )
        _take_layer_norms_apart(optimized.model)
        optimized.save_model_to_file(str(path))
    return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which warn about their own internals."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


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
