"""Segments of the runtime against transformers' BertModel in one piece: logits of all exits, and who leaves where."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime, Trace
from cascade_rt.engine.task import SingleLabel

from ..toy import LABELS, WORDS, segment_members, write_segments
from .torch_toy import bert, tokenizer

TASK = SingleLabel()

_DRAW = random.Random(2)
TEXTS = [" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(0, 45))) for _ in range(100)]  # several micro-batches


def one_piece(segments: int, layers_each: int, texts: list[Any], folder: Path) -> NDArray[np.float64]:
    """Return the probabilities of every exit, (segments, texts, labels): one pass of BertModel for each text alone."""
    members = segment_members(segments=segments, layers_each=layers_each)
    whole = bert(members[0].weights).bert.double()  # all segments have the encoder of the whole model
    heads = [bert(member.weights).double() for member in members]
    tokens = tokenizer(folder)
    answers = np.empty((segments, len(texts), len(LABELS)))
    for row, text in enumerate(texts):
        sides = [[text]] if isinstance(text, str) else [[side] for side in text]  # lists: one "" is no pair otherwise
        batch = tokens(*sides, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = whole(**batch, output_hidden_states=True).hidden_states
            for index, head in enumerate(heads):
                pooled = head.bert.pooler(states[(index + 1) * layers_each])
                answers[index, row] = torch.softmax(head.classifier(pooled)[0], -1).numpy()
    return answers


@pytest.mark.parametrize(("segments", "layers_each"), [(2, 2), (4, 1), (3, 2)])
def test_all_exits_answer_as_bertmodel_in_one_piece(tmp_path: Path, segments: int, layers_each: int) -> None:
    folder = write_segments(tmp_path / "segments", segments=segments, layers_each=layers_each)
    found = TASK.probabilities(CascadeRuntime(folder).member_logits(TEXTS)[0])
    expected = one_piece(segments, layers_each, TEXTS, tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.abs(expected[0] - expected[-1]).max() > 0.5, "the exits differ"


def test_pairs_have_their_token_types_in_the_first_segment(tmp_path: Path) -> None:
    pairs = list(zip(TEXTS[:30], TEXTS[30:60], strict=True))
    folder = write_segments(tmp_path / "segments", pair=True)
    found = TASK.probabilities(CascadeRuntime(folder).member_logits(pairs)[0])
    np.testing.assert_allclose(found, one_piece(2, 2, pairs, tmp_path), atol=1e-5, rtol=0)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_on_torchs_logits_text_by_text(tmp_path: Path, patience: int) -> None:
    """PABEE's loop on the logits of torch gives the exits, and later segments ran only who had not left.

    Four segments, because two can never leave early by patience: one agreement needs two of them.
    """
    classes = one_piece(4, 1, TEXTS, tmp_path).argmax(axis=-1)
    exits = []
    for column in classes.T:
        counter = 0
        for layer in range(4):
            counter = counter + 1 if layer and column[layer] == column[layer - 1] else 0
            if counter == patience or layer == 3:
                exits.append(layer)
                break
    rule = {"kind": "patience", "patience": patience}
    traces: list[Trace] = []
    runtime = CascadeRuntime(
        write_segments(tmp_path / "segments", segments=4, layers_each=1, exit_rule=rule), trace=traces.append
    )
    answers = runtime.predict(TEXTS)
    assert [answer.exit for answer in answers] == exits
    assert [answer.label for answer in answers] == [LABELS[classes[exit, row]] for row, exit in enumerate(exits)]
    assert [answer.layers for answer in answers] == [exit + 1 for exit in exits]
    assert len(set(exits)) == 4 - patience
    rows = [sum(run.rows for run in traces[0].runs if run.stage == stage) for stage in range(4)]
    assert rows == [sum(exit >= stage for exit in exits) for stage in range(4)]
