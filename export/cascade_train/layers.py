"""Where an encoder keeps its layers and its embeddings, for every family whose layers are a list of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def layer_lists(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of modules, with their names, that have as many as the encoder has layers."""
    deep = model.config.num_hidden_layers
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == deep
    ]


def keep_layers(config: Any, places: Sequence[int]) -> None:
    """Make a configuration that of an encoder which has the layers at these `places`, from 0, alone."""
    config.num_hidden_layers = len(places)
    if kinds := getattr(config, "layer_types", None):  # transformers 5 wants one for each layer
        config.layer_types = [kinds[place] for place in places]


def embeddings_name(model: Any) -> str:
    """Return the name of the module that holds an encoder's word embeddings; "" where that is the encoder itself."""
    words = model.get_input_embeddings()
    owners = (name for name, module in model.named_modules() if any(child is words for child in module.children()))
    return str(next(owners))
