"""Train a deep averaging network, as other members are trained: labels, a teacher's answers, validation, a record.

The table of n-grams is sparse: a step changes the rows of its texts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, EarlyStoppingCallback, PreTrainedTokenizerFast, set_seed

from cascade_rt.errors import InvalidOption
from cascade_train.averaging import AveragingForSequenceClassification, Network, new_network
from cascade_train.finetune import (
    LABELS_ALONE,
    Objective,
    Recipe,
    check_length,
    chosen_cuts,
    described,
    device,
    load_base,
    member_trainer,
    start_at_rates,
)
from cascade_train.inference import Row, collator
from cascade_train.ranges import check_ranges
from cascade_train.sources import load_tokenizer, pretrained
from cascade_train.tasks import TaskData
from cascade_train.work import CHECKPOINTS, claim, finish, trained, validated, work_folder

_SPREAD = 2.0  # standard deviation of the first vectors of tokens, from an encoder
_TOKENS_AT_ONCE = 512
_TEXTS_AT_ONCE = 1024
_VECTORS = "unigrams.npy"


@dataclass(frozen=True)
class AveragingRecipe(Recipe):
    """A recipe of training; found on Banking77, CLINC150 and SST-2."""

    epochs: float = 20
    learning_rate: float = 2e-3
    batch_size: int = 64
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    """Weight decay of the linear layers."""
    patience: int = 5
    """Validations without an improvement after which training ends."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        super().__post_init__()
        check_ranges(self, {"patience": (1, 1e4)})


USUAL = AveragingRecipe()


def train_averaging(
    data: TaskData,
    output: Path,
    *,
    tokenizer: str,
    unigrams: str | None = None,
    network: Network,
    recipe: AveragingRecipe = USUAL,
    objective: Objective = LABELS_ALONE,
) -> dict[str, Any]:
    """Train a deep averaging network on `data` and write its folder, in Hugging Face format, to `output`.

    `tokenizer`: the folder or hf:NAME of the cascade's. `unigrams`: an encoder with the same words; the vectors of
    tokens start from its answers to single tokens, without it at random. The folder holds the checkpoint that was best
    on validation, and the record. A killed run resumes from its last checkpoint when it is called again with the same
    arguments. Returns the record; raises CascadeError if `output` exists, another run's unfinished work is there, or
    the tokenizer or the encoder cannot be used.
    """
    work = work_folder(output, "train")
    run = {
        "base": None if unigrams is None else str(unigrams),
        "layers": 0,
        "tokenizer": str(tokenizer),
        "network": asdict(network),
        "objective": objective.described(),
        **described(data, recipe),
    }
    set_seed(recipe.seed)
    own, model = untrained(data, tokenizer, unigrams, network, recipe)
    claim(work, run, CHECKPOINTS, _VECTORS)
    if unigrams is not None:
        vectors = _kept(work / _VECTORS, lambda: token_vectors(unigrams, tokenizer, data.labels, network.dimension))
        model.set_token_vectors(vectors)
    if data.several:
        start_at_rates(model, data)
    optimizer = _Optimizer(model, recipe)
    trainer = member_trainer(model, own, data, recipe, objective, work, optimizer=optimizer)
    _see(model, trainer.train_dataset, collator(own))
    trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    facts = trained(trainer, output, data.metric)
    record = run | {"metric": data.metric, "validation": validated(trainer), **chosen_cuts(trainer, data), **facts}
    finish(work, output, model.save_pretrained, own, record, data)
    return record


def untrained(
    data: TaskData, tokenizer: str, unigrams: str | None, network: Network, recipe: AveragingRecipe
) -> tuple[PreTrainedTokenizerFast, AveragingForSequenceClassification]:
    """Return the tokenizer and a new network; raise CascadeError for arguments of `train_averaging` that do not fit."""
    if unigrams is not None:
        if not pretrained(AutoConfig, unigrams).num_hidden_layers:
            raise InvalidOption("unigrams", unigrams, "an encoder, with layers")
        load_base(unigrams, data.labels, None, tokenizer)
    own = load_tokenizer(tokenizer)
    model = new_network(own, data.labels, network, pair=data.pair, several=data.several)
    check_length(recipe.max_length, tokenizer, own, model)
    return own, model


def token_vectors(encoder: str, tokenizer: str, labels: tuple[str, ...], dimension: int) -> Tensor:
    """Return a vector for each token: an encoder's answer to the token alone, its principal components.

    float (tokens, dimension). The mean of the last hidden states of a text of one token, as model2vec starts from;
    minus the mean of all tokens, in the directions of the largest variance, scaled to one spread. Dimensions that the
    encoder does not have are 0. Raises InputError for an encoder that does not have the tokenizer's words.
    """
    words, model = load_base(encoder, labels, None, tokenizer)
    encode = getattr(model, model.base_model_prefix).eval().to(device())
    special = words("a", return_special_tokens_mask=True)
    ids, before = torch.tensor(special["input_ids"]), special["special_tokens_mask"].index(0)
    count = max(words.get_vocab().values()) + 1
    states = torch.empty(count, model.config.hidden_size)
    with torch.inference_mode():
        for start in tqdm(range(0, count, _TOKENS_AT_ONCE), desc="single tokens", unit=" batches", disable=None):
            some = torch.arange(start, min(count, start + _TOKENS_AT_ONCE))
            batch = ids[: before + 1].repeat(len(some), 1)
            batch[:, before] = some
            batch = torch.cat([batch, ids[len(ids) - _after(special) :].repeat(len(some), 1)], 1).to(device())
            answer = encode(input_ids=batch, attention_mask=torch.ones_like(batch))
            states[some] = answer.last_hidden_state.float().mean(1).cpu()
    states -= states.mean(0)
    _, axes = torch.linalg.eigh(states.T @ states)  # ascending
    vectors = states @ axes.flip(1)[:, :dimension]
    return functional.pad(_SPREAD * vectors / vectors.std(), (0, dimension - vectors.shape[1]))


def _see(
    model: AveragingForSequenceClassification, rows: Sequence[Row], collate: Callable[[list[Row]], dict[str, Tensor]]
) -> None:
    """Let the network know the n-grams of the training texts."""
    model.seen.fill_(False)
    for start in range(0, len(rows), _TEXTS_AT_ONCE):
        batch = collate(list(rows[start : start + _TEXTS_AT_ONCE]))
        model.see(batch["input_ids"], batch["attention_mask"])


def _after(special: Any) -> int:
    """Return how many special tokens end a text."""
    return int(special["special_tokens_mask"][::-1].index(0))


def _kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return an array that is kept beside an unfinished run, made now if it is not there."""
    if not file.exists():
        with (part := file.with_name(f".{file.name}")).open("wb") as stream:
            np.save(stream, make().numpy())
        part.replace(file)
    return torch.from_numpy(np.load(file, allow_pickle=False))


class _Optimizer(torch.optim.Optimizer):  # type: ignore[misc]  # the library has no types
    """Adam for the rows of the table that a step has read, AdamW for the linear layers; one rate for both."""

    def __init__(self, model: AveragingForSequenceClassification, recipe: Recipe) -> None:
        tables = [model.table.weight]
        others = [weight for name, weight in model.named_parameters() if not name.startswith("table.")]
        self._parts = (
            torch.optim.SparseAdam(tables, lr=recipe.learning_rate),
            torch.optim.AdamW(others, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
        )
        super().__init__([*tables, *others], {"lr": recipe.learning_rate})
        self._join()

    def _join(self) -> None:
        """Let a schedule see the groups of both parts."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Change all weights that have a gradient."""
        for part in self._parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both parts."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the states of both parts."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
