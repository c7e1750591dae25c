"""Multi-exit models: one classifier with further ones after its layers, as DeeBERT, PABEE and FastBERT train them.

The last exit is the classifier's own head, so the folder of a multi-exit model is also that of a normal member. The
training loop is transformers' `Trainer`; a killed run resumes where it was.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, set_seed

from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.tuning.metrics import accuracy
from cascade_train import RECORD
from cascade_train.finetune import (
    Recipe,
    check_length,
    described,
    finetune,
    freeze,
    load_base,
    load_member,
    validated_arguments,
)
from cascade_train.inference import collator, features
from cascade_train.losses import distillation
from cascade_train.settings import guarded
from cascade_train.sources import load_classifier
from cascade_train.tasks import TaskData
from cascade_train.work import claim, finish, trained, validated, work_folder

DEEBERT, PABEE, FASTBERT = "deebert", "pabee", "fastbert"
KINDS = (DEEBERT, PABEE, FASTBERT)
EXITS_FILE = "exits.safetensors"
"""Weights of the exits before the last, in a multi-exit model's folder."""

_NARROW = 128  # FastBERT's student classifiers compute with vectors of this size (section 3.2.2)
_NARROW_HEADS = 2


class PooledExit(nn.Module):  # type: ignore[misc]  # the library has no types
    """A classifier of a layer's first token: BERT's pooler and a linear layer.

    What DeeBERT (section 3.1) and PABEE (section 3.1) put after each layer.
    """

    def __init__(self, hidden: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, labels)

    @property
    def flops(self) -> tuple[int, ...]:
        """FLOPs for a text of n tokens, as factors of 1, n and n^2."""
        return (2 * (self.pooler.weight.numel() + self.classifier.weight.numel()),)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, (batch, labels), from hidden states (batch, tokens, hidden)."""
        return self.classifier(self.dropout(torch.tanh(self.pooler(states[:, 0]))))


class AttentionExit(nn.Module):  # type: ignore[misc]  # the library has no types
    """A classifier with a small self-attention over a layer's tokens, narrowed to 128 (FastBERT, section 3.2.2)."""

    def __init__(self, hidden: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.narrow = nn.Linear(hidden, _NARROW)
        self.query, self.key, self.value, self.output = (nn.Linear(_NARROW, _NARROW) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_NARROW, labels)

    @property
    def flops(self) -> tuple[int, ...]:
        """FLOPs for a text of n tokens, as factors of 1, n and n^2."""
        each = (self.narrow, self.query, self.key, self.value, self.output)
        return 2 * self.classifier.weight.numel(), 2 * sum(layer.weight.numel() for layer in each), 4 * _NARROW

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, (batch, labels), from hidden states (batch, tokens, hidden) and an attention mask."""
        narrow = self.narrow(states)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (_NARROW_HEADS, -1)).transpose(1, 2)

        query, key, value = (heads(projection(narrow)) for projection in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(_NARROW // _NARROW_HEADS)
        scores = scores + (1.0 - mask[:, None, None, :].to(scores.dtype)) * torch.finfo(torch.float32).min
        attended = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
        return self.classifier(self.dropout(torch.tanh(self.output(attended)[:, 0])))


class MultiExitClassifier(nn.Module):  # type: ignore[misc]  # the library has no types
    """A sequence classifier of transformers with further classifiers after some of its layers."""

    def __init__(self, model: Any, kind: str, after: Sequence[int]) -> None:
        """`after`: the layers with an exit, counted from 1, ascending, without the last."""
        super().__init__()
        config = model.config
        dropout = float(getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.1)))
        make = AttentionExit if kind == FASTBERT else PooledExit
        self.model = model
        self.config = config
        self.kind = kind
        self.after = tuple(after)
        self.exits = nn.ModuleList(make(config.hidden_size, config.num_labels, dropout) for _ in self.after)

    def train(self, mode: bool = True) -> MultiExitClassifier:
        """Switch to training; a frozen model answers as it will at inference, without dropout."""
        super().train(mode)
        if self.kind != PABEE:
            self.model.eval()
        return self

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> Tensor:
        """Return the logits of all exits, (exits, batch, labels)."""
        found = self.model(**batch, output_hidden_states=True)
        states, mask = found.hidden_states, batch["attention_mask"]
        early = [head(states[layer], mask) for head, layer in zip(self.exits, self.after, strict=True)]
        return torch.stack([*early, found.logits])


def exit_loss(logits: Tensor, labels: Tensor, kind: str, after: Sequence[int], layers: int) -> Tensor:
    """Return the loss of all exits' logits, (exits, batch, labels), a scalar.

    DeeBERT: the sum of the cross entropies of all exits but the last, which is trained already (section 3.2, second
    stage). PABEE: the mean of all, weighted by depth (Eq. 3). FastBERT: the sum of the Kullback-Leibler divergences of
    all but the last from the last, on texts with or without labels (section 3.2.2).
    """
    if kind == FASTBERT:
        return torch.stack([distillation(student, logits[-1].detach(), 1.0) for student in logits[:-1]]).sum()
    losses = torch.stack([functional.cross_entropy(exit.float(), labels) for exit in logits])
    if kind == DEEBERT:
        return losses[:-1].sum()
    depths = torch.tensor([*after, layers], dtype=losses.dtype, device=losses.device)
    return (losses * depths).sum() / depths.sum()


def train_exits(
    base: str,
    data: TaskData,
    output: Path,
    *,
    kind: str,
    every: int = 1,
    recipe: Recipe,
) -> dict[str, Any]:
    """Train a multi-exit model, and write its folder to `output`.

    `base`: an encoder (a folder or hf:NAME), or for DeeBERT and FastBERT a member that `finetune` trained on
    this task, whose weights stay as they are; these two fine-tune an encoder first. PABEE trains encoder and all exits
    together. `every`: layers between two exits. The folder is that of a normal member, the last exit, with the other
    exits in EXITS_FILE. A killed run resumes. Returns the record; raises CascadeError as `finetune` does.
    """
    if kind not in KINDS:
        raise InvalidOption("kind", kind, f"one of {', '.join(KINDS)}")
    if data.several:
        raise InputError(
            f"{data.name}: found several labels per text, expected one: exits are trained with one label; "
            "train complete members instead"
        )
    work = work_folder(output, "train")
    member = base
    if kind != PABEE and not (Path(base) / RECORD).is_file():
        member = str(output.with_name(output.name + ".member"))
        if not Path(member).exists():
            finetune(base, data, Path(member), recipe=recipe)
    run = {
        "base": str(base),
        "kind": kind,
        "every": every,
        **described(data, recipe),
    }
    set_seed(recipe.seed)
    if kind == PABEE:
        tokenizer, model = load_base(base, data.labels, None)
    else:
        tokenizer, model = load_member(member, data.labels, "base")
    layers = model.config.num_hidden_layers
    if not 1 <= every < layers:
        raise InvalidOption("every", every, f"1 to {layers - 1}, fewer than the {layers} layers of {base}")
    check_length(recipe.max_length, base, tokenizer, model)
    after = range(every, layers, every)
    claim(work, run)
    trainer = _trainer(MultiExitClassifier(model, kind, after), tokenizer, data, recipe, work)
    facts = trained(trainer, output, "accuracy")
    record = run | {
        "exits": {"kind": kind, "after": list(after)},
        "metric": "accuracy",
        "objective": {},
        "validation": validated(trainer),
        **facts,
    }
    finish(work, output, lambda folder: write_exits(folder, trainer.model), tokenizer, record, data)
    if member != base:
        shutil.rmtree(member)
    return record


def write_exits(folder: Path, whole: MultiExitClassifier) -> None:
    """Write the weights of a multi-exit model, and its configuration."""
    whole.model.save_pretrained(folder)
    save_file(whole.exits.state_dict(), str(folder / EXITS_FILE))


def open_exits(source: str | Path) -> MultiExitClassifier:
    """Open the folder of a multi-exit model; raise InputError for any other."""
    folder = Path(source)
    with guarded(str(source), "cannot be opened", "expected a multi-exit model that cascade-rt train-exits wrote"):
        settings = json.loads((folder / RECORD).read_text("utf-8"))["exits"]
        model = load_classifier(str(source))
        found = MultiExitClassifier(model, settings["kind"], settings["after"])
        found.exits.load_state_dict(load_file(str(folder / EXITS_FILE)))
    found.eval()
    return found


class _ExitTrainer(Trainer):  # type: ignore[misc]  # the library has no types
    """A Trainer with the loss of a multi-exit model."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and with it the logits by text: (batch, exits, labels)."""
        logits = model(**inputs)
        whole = self.accelerator.unwrap_model(model)
        loss = exit_loss(logits, inputs["labels"], whole.kind, whole.after, whole.config.num_hidden_layers)
        return (loss, {"loss": loss, "logits": logits.transpose(0, 1)}) if return_outputs else loss


def _trainer(model: MultiExitClassifier, tokenizer: Any, data: TaskData, recipe: Recipe, work: Path) -> _ExitTrainer:
    freeze(model.model, recipe)
    if model.kind != PABEE:
        model.model.requires_grad_(False)
    return _ExitTrainer(
        model=model,
        args=validated_arguments(recipe, work, len(data.train), "accuracy", label_names=["labels"]),
        train_dataset=features(tokenizer, model.model, data.train, recipe.max_length),
        eval_dataset=features(tokenizer, model.model, data.validation, recipe.max_length),
        data_collator=collator(tokenizer),
        compute_metrics=lambda outcome: _measured(outcome.predictions, outcome.label_ids),
    )


def _measured(logits: NDArray[np.float32], labels: NDArray[np.intp]) -> dict[str, Any]:
    """Return the accuracy of each exit, and their mean, from logits (texts, exits, labels)."""
    each = [accuracy(labels, logits[:, exit].argmax(axis=-1)) for exit in range(logits.shape[1])]
    return {"accuracy": float(np.mean(each)), "exits": each}
