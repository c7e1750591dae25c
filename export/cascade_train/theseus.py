"""Module replacing (BERT-of-Theseus; Xu et al., 2020): the layers of a fine-tuned member give way to fewer new ones.

Each layer of the successor stands for a group of the predecessor's layers, its module. In training, a module is
replaced at random, more and more often; at inference the successor is a normal member.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from cascade_rt.errors import InputError
from cascade_train.layers import layer_lists

_FIRST_RATE = 0.3
_ALL_REPLACED = 0.6  # share of the steps after which the successor is alone


def replacement_rate(done: float) -> float:
    """Return the share of modules that are replaced after a share of the steps, both 0 to 1.

    It rises linearly (section 3.3, curriculum replacement); from then on the successor is fine-tuned.
    """
    return min(1.0, _FIRST_RATE + (1 - _FIRST_RATE) * done / _ALL_REPLACED)


class ModuleReplacing(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Lets a successor's layers take turns with the predecessor's modules while it is trained.

    The predecessor's weights stay as they are, and so do the successor's embeddings and classifier, which are the
    predecessor's (section 3.1). Outside training, the successor answers alone.
    """

    def __init__(self, predecessor: Any, successor: Any) -> None:
        """`successor`: a model of the same family with fewer layers; its layers run differently from now on."""
        predecessor.eval().requires_grad_(False)
        successor.requires_grad_(False)
        if not (layer_lists(predecessor) and layer_lists(successor)):
            raise InputError(f"a {type(successor).__name__} has no list of layers, so no module can be replaced")
        (_, old), (_, new) = layer_lists(predecessor)[0], layer_lists(successor)[0]
        self.replaced = torch.ones(len(new), dtype=torch.bool)
        """Which of the successor's layers run in this step of training."""
        for index, (layer, places) in enumerate(zip(new, np.array_split(np.arange(len(old)), len(new)), strict=True)):
            layer.requires_grad_(True)
            module = [old[place] for place in places]
            # transformers 5 gives each layer the mask and positions of its kind of attention.
            if len(kinds := {getattr(one, "attention_type", None) for one in [layer, *module]}) > 1:
                raise InputError(
                    f"a {type(successor).__name__} has {' and '.join(sorted(map(str, kinds)))} in layers that would "
                    "take turns, and transformers 5 runs none of them in place of the other; train without module "
                    "replacing, or with transformers 4"
                )
            self._take_turns(index, layer, module)

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the modules that are replaced, at least one: without any there is nothing to train."""
        self.replaced = torch.rand(len(self.replaced)) < replacement_rate(state.global_step / state.max_steps)
        if not self.replaced.any():
            self.replaced[torch.randint(len(self.replaced), ())] = True

    def _take_turns(self, index: int, layer: Any, module: Sequence[Any]) -> None:
        alone = layer.forward
        first = next(iter(inspect.signature(alone).parameters))  # the hidden states

        def forward(*places: Any, **names: Any) -> Any:
            if not layer.training or self.replaced[index]:
                return alone(*places, **names)
            found: Any = places[0] if places else names.pop(first)
            for one in module:
                found = one(found[0] if isinstance(found, tuple) else found, *places[1:], **names)
            return found

        layer.forward = forward
