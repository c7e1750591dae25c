"""A multi-exit model in segments: each reads tokens, or the hidden states of the one before it.

Works for every family whose layers are a list of modules: a segment is the model itself with some of its layers, and,
but for the first, with embeddings that pass hidden states on.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from cascade_train.exits import MultiExitClassifier
from cascade_train.layers import embeddings_name, layer_lists
from torch import Tensor, nn

from cascade_rt.errors import InputError


class Segment(nn.Module):  # type: ignore[misc]  # the library has no types
    """Some layers of a multi-exit model, and the exit after them."""

    def __init__(self, whole: MultiExitClassifier, index: int) -> None:
        """`index`: of the exit, from 0."""
        super().__init__()
        bounds = [0, *whole.after, whole.config.num_hidden_layers]
        self.layers = range(bounds[index], bounds[index + 1])
        self.leaves_hidden_states = index < len(whole.after)
        self.config = whole.config
        model = copy.deepcopy(whole.model).eval()
        self._keep_layers(model)
        if index:
            _pass_hidden_states(model)
        self.reads_tokens = index == 0
        self.exit = copy.deepcopy(whole.exits[index]).eval() if self.leaves_hidden_states else None
        # Where the model goes on, its own head has no place in the segment.
        self.model = model.base_model if self.leaves_hidden_states else model
        self.types = "token_type_ids" in inspect.signature(model.forward).parameters and self.reads_tokens

    def _keep_layers(self, model: Any) -> None:
        lists = layer_lists(model)
        if not lists:
            raise InputError(f"a {type(model).__name__} has no list of layers, so it cannot be cut into segments")
        for name, layers in lists:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.ModuleList(layers[self.layers.start : self.layers.stop]))

    def forward(self, first: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Return the exit's logits, and the hidden states if another segment reads them."""
        batch = {"input_ids" if self.reads_tokens else "inputs_embeds": first, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        found = self.model(**batch)
        if self.exit is None:
            return found.logits
        states = found.last_hidden_state
        return self.exit(states, attention_mask), states

    def example(self, tokens: int) -> dict[str, Tensor]:
        """Return a batch to trace, by input name: two texts, of which the second is padded."""
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[1, tokens // 2 :] = 0
        if not self.reads_tokens:
            return {"hidden_states": torch.randn(2, tokens, self.config.hidden_size), "attention_mask": mask}
        batch = {"input_ids": mask * 5, "attention_mask": mask}
        return batch | ({"token_type_ids": torch.zeros_like(mask)} if self.types else {})


class _NoEmbeddings(nn.Module):  # type: ignore[misc]  # the library has no types
    """In place of the embeddings: returns the hidden states that it is given."""

    def forward(self, *places: Any, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        # DistilBERT gives token ids, which are None here, and hidden states by their places.
        return next(value for value in (inputs_embeds, *places) if value is not None)


def _pass_hidden_states(model: Any) -> None:
    encoder = model.base_model
    name = embeddings_name(encoder)
    if not name:
        raise InputError(f"a {type(model).__name__} has no module of embeddings, so it cannot be cut into segments")
    owner, _, attribute = name.rpartition(".")
    setattr(encoder.get_submodule(owner), attribute, _NoEmbeddings())
    if hasattr(encoder, "embeddings_project"):  # ELECTRA's, where embeddings are smaller than hidden states
        del encoder.embeddings_project
