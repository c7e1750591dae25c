"""Every supported family: the exported member answers as torch does, in fp32 and in int8, whatever the company."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cascade_export.check import batch_difference, probabilities
from cascade_export.export import export_bundle
from cascade_export.torch_checkpoint import open_torch
from cascade_export.verify import check_texts, torch_probabilities
from numpy.typing import NDArray

from cascade_rt import BundleError, CascadeRuntime
from cascade_rt.bundle import BATCH_TOLERANCE
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.types import Text

from .families import FAMILIES, POSITIONS
from .int8_bundles import to_int8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_torch_does(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "member")
    checkpoint = open_torch(str(folder), pair=True)
    assert checkpoint.max_length == POSITIONS, "as many tokens as it has positions"
    texts = check_texts(checkpoint)
    original = torch_probabilities(checkpoint, texts)
    bundle = export_bundle([str(folder)], tmp_path / "fp32", pair=True)
    to_int8(shutil.copytree(tmp_path / "fp32", tmp_path / "int8"))
    for precision, tolerance, in_the_mean in (("fp32", 1e-4, 1e-5), ("int8", 0.5, 0.06)):
        runtime = CascadeRuntime(tmp_path / precision)
        answers = _probabilities(runtime, texts)
        difference = np.abs(answers - original)
        assert difference.max() <= tolerance
        assert difference.mean() <= in_the_mean
        assert np.ptp(original, axis=0).max() > 0.1, "the texts get different answers"
        member = runtime.plan.stages[0]
        encoded = TextTokenizer(tmp_path / precision / "tokenizer.json", POSITIONS, pair=True).encode(texts)
        moved = batch_difference(member, encoded, probabilities(member, encoded))
        assert moved is not None
        assert moved <= BATCH_TOLERANCE
        assert len(set(encoded.lengths.tolist())) > 3, "some are padded"
        (entry,) = bundle.members
        assert (entry.layers, entry.hidden_size) == (2, checkpoint.hidden_size)
        assert entry.parameters == sum(weight.numel() for weight in checkpoint.model.parameters())
        if precision == "fp32" and find_spec("openvino"):
            on_openvino = CascadeRuntime(tmp_path / precision, provider="openvino")
            if family.startswith("deberta"):
                with pytest.raises(BundleError, match="OpenVINO cannot load it .*use the provider cpu"):
                    on_openvino.predict(texts)
            else:
                assert np.abs(_probabilities(on_openvino, texts) - original).max() <= tolerance


def _probabilities(runtime: CascadeRuntime, texts: Sequence[Text]) -> NDArray[np.float64]:
    return np.array([answer.probabilities for answer in runtime.predict(texts)])
