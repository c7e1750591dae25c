"""Checkpoint -> ONNX through Optimum -> fused by ONNX Runtime's transformer optimizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.transformers.optimizer import optimize_model
from optimum.exporters.onnx import main_export

from cascade_export.checkpoint import Checkpoint


def convert(checkpoint: Checkpoint, path: Path) -> dict[str, int]:
    """Write the member's fused fp32 graph to `path`; return how often each fused operator occurs in it."""
    with TemporaryDirectory(prefix="cascade-export-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, about their internals
        main_export(
            checkpoint.source,
            output=folder,
            task="text-classification",
            device="cpu",
            dtype="fp32",
            library_name="transformers",
            do_validation=False,  # the finished, fused graph is verified, not this one
            no_post_process=True,
        )
        optimized = optimize_model(
            str(Path(folder) / "model.onnx"),
            model_type="bert",  # the fusions of all BERT-like encoders
            num_heads=checkpoint.config.num_attention_heads,
            hidden_size=checkpoint.config.hidden_size,
            opt_level=0,
        )
        optimized.save_model_to_file(str(path))
    return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
