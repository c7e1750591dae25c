"""FLOPs counted in a graph are those that torch counts when it runs the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cascade_export.convert import convert
from cascade_export.flops import graph_flops
from cascade_export.precision import write_precision
from cascade_export.torch_checkpoint import open_torch
from numpy.polynomial.polynomial import polyval
from torch.utils.flop_counter import FlopCounterMode

from cascade_rt.bundle.manifest import encoder_flops

from .families import FAMILIES

GATED = [family for family in FAMILIES if family.startswith(("modernbert, w", "eurobert", "gte"))]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", *GATED])
def test_flops_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    checkpoint = open_torch(str(FAMILIES[family](tmp_path / "member")))
    convert(checkpoint, tmp_path / "fp32.onnx")
    write_precision(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", "int8")
    for tokens in (5, 41):
        ids = torch.full((1, tokens), 9)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            checkpoint.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        for precision in ("fp32", "int8"):
            found = polyval(tokens, graph_flops(tmp_path / f"{precision}.onnx"))
            assert found == pytest.approx(counter.get_total_flops(), rel=2e-3), precision
    plain = encoder_flops(checkpoint.layers, checkpoint.hidden_size, checkpoint.intermediate_size, 41)
    assert (abs(found / plain - 1) < 0.05) == (family in ("bert", "roberta")), "two matrices in a block, or three"
