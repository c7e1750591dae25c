"""Fused rotary attention: few operators, torch's answers whatever the shape, and no change where it does not fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cascade_export import fusion
from cascade_export.convert import convert
from cascade_export.precision import write_precision
from cascade_export.torch_checkpoint import open_torch

from .families import FAMILIES, POSITIONS


def converted(family: str, folder: Path, **settings: Any) -> tuple[Any, Path]:
    """Write a family's model and its graph; return the torch model and the graph's file."""
    checkpoint = open_torch(str(FAMILIES[family](folder / "member", **settings)))
    convert(checkpoint, folder / "fp32.onnx")
    return checkpoint.model, folder / "fp32.onnx"


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node if node.op_type != "Constant")


def check_answers(model: Any, file: Path, tolerance: float, lengths: tuple[int, ...] = (POSITIONS, 20, 9, 2)) -> None:
    """Compare logits for texts of some lengths, padded to the longest."""
    draw = np.random.default_rng(0)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = draw.integers(5, 100, mask.shape) * mask + model.config.pad_token_id * (1 - mask)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    session = onnxruntime.InferenceSession(str(file))
    (found,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 32, "num_attention_heads": 2, "local_attention": 2},
        {"hidden_size": 48, "num_attention_heads": 4, "local_attention": 2 * POSITIONS, "intermediate_size": 20},
        {"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "attention_bias": True, "mlp_bias": True},
        {"global_attn_every_n_layers": 1, "hidden_activation": "silu", "norm_bias": True},
    ],
)
def test_any_shape_answers_as_torch_does(settings: dict[str, Any], tmp_path: Path) -> None:
    model, file = converted("modernbert", tmp_path, **settings)
    assert operators(file)["MultiHeadAttention"] == model.config.num_hidden_layers
    check_answers(model, file, 1e-4)


def test_a_layer_has_few_operators(tmp_path: Path) -> None:
    found = []
    for layers in (2, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        _, file = converted("modernbert", folder, num_hidden_layers=layers)
        counts = operators(file)
        assert counts["MultiHeadAttention"] == layers
        assert counts["RotaryEmbedding"] == 2 * layers
        assert not counts.keys() & {"Softmax", "Slice", "Split", "Neg", "SkipLayerNormalization"}
        found.append(sum(counts.values()))
    assert found[1] - found[0] <= 2 * 16
    assert found[0] <= 60


def test_angles_of_late_positions_are_exact_in_half_precision(tmp_path: Path) -> None:
    model, file = converted(
        "modernbert", tmp_path, max_position_embeddings=3000, num_hidden_layers=1, initializer_range=0.1
    )
    write_precision(file, tmp_path / "fp16.onnx", "fp16")
    check_answers(model, tmp_path / "fp16.onnx", 0.05, lengths=(2500, 30))


def test_a_fusion_that_answers_otherwise_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion._Fusion, "_window", lambda *_: 1)
    model, file = converted("modernbert", tmp_path)
    assert operators(file)["Softmax"] == 2
    assert not operators(file)["MultiHeadAttention"]
    check_answers(model, file, 1e-4)


def test_other_attention_is_left_as_it_is(tmp_path: Path) -> None:
    _, file = converted("deberta-v3 (deberta-v2)", tmp_path)
    assert operators(file)["Softmax"] == 2
    assert not operators(file).keys() & {"RotaryEmbedding", "MultiHeadAttention"}
