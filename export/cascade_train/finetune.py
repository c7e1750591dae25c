"""Fine-tune one member: any Hugging Face encoder, whole or its first k layers, with the paper's recipe.

The training loop is transformers' `Trainer`. This module gives it the recipe and the objective: labels, and what
`losses.py` adds to them. A killed run resumes where it was, and the member's folder appears only when it is complete.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cascade_rt.engine.task import MultiLabel
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.cuts import best_cuts
from cascade_rt.tuning.metrics import accuracy, f1, f1_of_sets
from cascade_train import RECORD
from cascade_train.alignment import align, usable_positions
from cascade_train.compat import training_arguments
from cascade_train.inference import EXTRAS, answers, collator, features, first_token_states, target
from cascade_train.layers import keep_layers
from cascade_train.losses import (
    difficulty_aware_regularization,
    distillation,
    distillation_of_sets,
    patient_distillation,
)
from cascade_train.ranges import check_ranges
from cascade_train.settings import PROBLEM_TYPES
from cascade_train.sources import (
    check_tokens,
    classifier_settings,
    load_classifier,
    load_tokenizer,
    mismatched_weights,
    pretrained,
)
from cascade_train.tasks import Examples, TaskData
from cascade_train.theseus import ModuleReplacing
from cascade_train.work import claim, finish, trained, validated, work_folder

RECIPE_RANGES: Mapping[str, tuple[float, float]] = {
    "epochs": (1e-3, 1e4),
    "learning_rate": (0, 1),
    "batch_size": (1, 1e5),
    "max_length": (3, 1e6),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, 1),
    "seed": (0, 2**32 - 1),
}
"""The lowest and the highest value of each setting of a recipe."""


@dataclass(frozen=True)
class Recipe:
    """A recipe of fine-tuning; the defaults are the paper's (section 4.1), lengths and batches BERT's usual ones."""

    epochs: float = 10
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    evaluations_per_epoch: int = 1
    """Validations per epoch; each writes a checkpoint to resume from."""
    bf16: bool = False
    """Train in bfloat16: faster on CPUs with AMX, and on GPUs."""
    freeze_embeddings: bool = False
    """Leave the table of the words as it is, so that members of one encoder share it in a bundle."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        check_ranges(self, {**RECIPE_RANGES, "evaluations_per_epoch": (1, 1e4)})


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's states that a student's layers learn under patient distillation (BERT-PKD; Sun et al., 2019)."""

    layers: Sequence[int]
    """The teacher's layer for each of the student's but the last, counted from 1."""
    states: NDArray[np.float16]
    """States of the first token after these layers, for each training example: (examples, layers, hidden)."""


@dataclass(frozen=True)
class Objective:
    """Objectives of a member besides its labels; by default none.

    The loss is (1 - distill_weight) * cross entropy + distill_weight * distillation + patient_weight * patient
    distillation + dar_weight * DAR, without the terms that are not used.
    """

    difficulty: Sequence[int] | None = None
    """0 (easy) or 1 (difficult) for each training example."""
    dar_margin: float = 0.5
    dar_weight: float = 0.5
    teacher: NDArray[np.float32] | None = None
    """The teacher's logits for each training example, (examples, labels)."""
    temperature: float = 2.0
    distill_weight: float = 0.5
    patient: TeacherStates | None = None
    patient_weight: float = 0.5

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        weights = {"dar_weight": (0, 1e3), "distill_weight": (0, 1), "patient_weight": (0, 1e3)}
        check_ranges(self, {"dar_margin": (0, 1), "temperature": (1e-2, 1e3), **weights})

    def described(self) -> dict[str, Any]:
        """Return the settings that a training record keeps."""
        settings: dict[str, Any] = {}
        if self.difficulty is not None:
            difficult = float(np.mean(self.difficulty))
            settings["dar"] = {"margin": self.dar_margin, "weight": self.dar_weight, "difficult": difficult}
        if self.teacher is not None:
            settings["distillation"] = {"temperature": self.temperature, "weight": self.distill_weight}
        if self.patient is not None:
            settings["patient"] = {"weight": self.patient_weight, "layers": list(self.patient.layers)}
        return settings


LABELS_ALONE = Objective()
OPTIMIZER = "adamw_torch_fused"  # on CPUs, a step of a 3-layer member takes 0.6 times as long as with "adamw_torch"
# On CPUs, torch's fused attention has a slow backward pass: in bfloat16, half of a step.
TRAINED_ATTENTION = None if torch.cuda.is_available() else "eager"
# Gradients of tables are sparse, and cannot be clipped; and padding costs networks without layers nothing.
_OF_NETWORKS = {"max_grad_norm": 0.0, "group_by_length": False}
_LOGGED = 20  # steps between two updates of the loss on the progress bar


def finetune(
    base: str,
    data: TaskData,
    output: Path,
    *,
    layers: int | None = None,
    tokenizer: str | None = None,
    module_replacing: bool = False,
    recipe: Recipe,
    objective: Objective = LABELS_ALONE,
) -> dict[str, Any]:
    """Fine-tune `base` (a folder or hf:NAME) on `data` and write a Hugging Face folder to `output`.

    `layers` keeps only the first k encoder layers (the paper's BERT-kL, section 2.1). `tokenizer` is the folder or
    hf:NAME of another tokenizer than the base's, with the same words under any ids: the member is trained and written
    with it, so it fits into a cascade of that tokenizer. `module_replacing`: `base` is a fine-tuned member, and the k
    layers replace its modules (`theseus.py`). The folder holds the checkpoint that was best on validation, and
    the record. A killed run resumes from its last checkpoint when it is called again with the same arguments. Returns
    the record; raises CascadeError if `output` exists, another run's unfinished work is there, or `base` cannot be
    loaded or aligned to `tokenizer`.
    """
    work = work_folder(output, "train")
    run = {
        "base": str(base),
        "layers": layers,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "module_replacing": module_replacing,
        "objective": objective.described(),
        **described(data, recipe),
    }
    set_seed(recipe.seed)
    member_tokenizer, model = load_base(base, data.labels, layers, tokenizer, several=data.several)
    check_length(recipe.max_length, base, member_tokenizer, model)
    replacing = [_module_replacing(base, data, model, tokenizer)] if module_replacing else []
    if objective.patient is not None:
        _check_patient(objective.patient, model, base)
    claim(work, run)
    freeze(model, recipe)
    if data.several and not last_linear(model).bias.any():  # a new classifier
        start_at_rates(model, data)
    trainer = member_trainer(model, member_tokenizer, data, recipe, objective, work)
    for callback in replacing:
        trainer.add_callback(callback)
    facts = trained(trainer, output, data.metric)
    record = run | {"metric": data.metric, "validation": validated(trainer), **chosen_cuts(trainer, data), **facts}
    finish(work, output, model.save_pretrained, member_tokenizer, record, data)
    return record


def freeze(model: Any, recipe: Recipe) -> None:
    """Leave the model's word embeddings out of training, where the recipe says so."""
    if recipe.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)


def chosen_cuts(trainer: Trainer, data: TaskData) -> dict[str, list[float]]:
    """Return what the record of a member with several labels has: the cut of each, the best on validation."""
    if not data.several:
        return {}
    outcome = trainer.predict(trainer.eval_dataset)
    return {"cuts": list(_cuts(outcome.predictions, outcome.label_ids))}


def described(data: TaskData, recipe: Recipe) -> dict[str, Any]:
    """Return what the record of every training has."""
    return {
        "task": data.name,
        "labels": list(data.labels),
        **({"several": True} if data.several else {}),
        "pair": data.pair,
        "max_length": recipe.max_length,
        "recipe": asdict(recipe),
        "data": data.described(),
    }


def _module_replacing(base: str, data: TaskData, model: Any, tokenizer: str | None) -> ModuleReplacing:
    if tokenizer is not None:
        raise InvalidOption("tokenizer", tokenizer, "none with module replacing: the member has its own")
    # Its attention is that of the successor's layers.
    _, predecessor = load_member(base, data.labels, "base", several=data.several, attention=TRAINED_ATTENTION)
    if model.config.num_hidden_layers >= predecessor.config.num_hidden_layers:
        deep = predecessor.config.num_hidden_layers
        raise InvalidOption("layers", model.config.num_hidden_layers, f"fewer than the {deep} layers of {base}")
    return ModuleReplacing(predecessor.to(device()), model)


def _check_patient(patient: TeacherStates, model: Any, base: str) -> None:
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    if (len(patient.layers), patient.states.shape[-1]) != (layers - 1, hidden):
        raise InvalidOption(
            "patient",
            [len(patient.layers), patient.states.shape[-1]],
            f"[{layers - 1}, {hidden}], the layers and dimensions to match in {base}",
        )


def check_length(max_length: int, base: str, tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    """Raise InvalidOption for more tokens than the model has positions for."""
    longest = int(min(usable_positions(model), tokenizer.model_max_length))
    if max_length > longest:
        raise InvalidOption("max_length", max_length, f"at most {longest}, the positions of {base}")


def last_linear(model: Any) -> torch.nn.Linear:
    """Return the linear layer that gives a classifier's logits; raise CascadeError if there is none."""
    heads = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not heads:
        raise CascadeError(f"found no linear last layer in a {type(model).__name__}; this model is not supported here")
    return heads[-1]


def start_at_rates(model: Any, data: TaskData) -> None:
    """Let a new classifier of several labels answer each with its rate in training, by the bias of its last layer.

    Rare labels start far below a half, as in RetinaNet (Lin et al., 2017, section 3.3). From a bias of 0, the first
    hundreds of steps push the whole encoder to one answer, which a deep one does not recover from.
    """
    has = np.array([target(label, len(data.labels)) for label in data.train.labels])
    rates = (has.sum(axis=0) + 1) / (len(has) + 2)
    with torch.no_grad():
        last_linear(model).bias.copy_(torch.logit(torch.as_tensor(rates)))


def search_margin(
    base: str, data: TaskData, output: Path, margins: Sequence[float], *, objective: Objective, **settings: Any
) -> dict[str, Any]:
    """Fine-tune one member per DAR margin, and keep the one that is best on validation (of equals, the first).

    Takes the arguments of `finetune`. The members are beside `output` until all are trained, so a killed search can
    continue. The record has the validation metric of each margin.
    """
    work_folder(output, "train")
    folders = {margin: output.with_name(f"{output.name}.margin-{margin:g}") for margin in margins}
    for margin, folder in folders.items():
        if not folder.exists():
            finetune(base, data, folder, objective=replace(objective, dar_margin=margin), **settings)
    records = {margin: json.loads((folder / RECORD).read_text("utf-8")) for margin, folder in folders.items()}
    best = max(margins, key=lambda margin: float(records[margin]["validation"]["best"]))
    record: dict[str, Any] = records[best]
    record["objective"]["dar"]["grid"] = {str(margin): found["validation"]["best"] for margin, found in records.items()}
    write_json(folders[best] / RECORD, record)
    folders.pop(best).rename(output)
    for folder in folders.values():
        shutil.rmtree(folder)
    return record


def teacher_logits(source: str, data: TaskData, recipe: Recipe) -> NDArray[np.float32]:
    """Return a fine-tuned member's logits for the training examples, float32 (examples, labels).

    Raises InputError where it cannot be opened or has other labels.
    """
    return logits_of(source, data, data.train, recipe.max_length, bf16=recipe.bf16)


def patient_layers(deep: int, layers: int, strategy: str) -> list[int]:
    """Return the layer of a teacher of `deep` layers for each of a student's but the last, counted from 1.

    "skip": evenly spread over the teacher; "last": the ones before its last (Sun et al., 2019, section 3.2).
    """
    if not 1 < layers <= deep:
        raise InvalidOption("layers", layers, f"2 to {deep}, the layers of the teacher, for patient distillation")
    if strategy == "skip":
        return [layer * deep // layers for layer in range(1, layers)]
    return list(range(deep - layers + 1, deep))


def teacher_states(source: str, data: TaskData, recipe: Recipe, layers: int, strategy: str = "skip") -> TeacherStates:
    """Return the hidden states of a fine-tuned member that a student of `layers` layers learns.

    `strategy`: that of `patient_layers`.
    """
    tokenizer, model = load_member(source, data.labels, "teacher", several=data.several)
    model.to(device())
    matched = patient_layers(model.config.num_hidden_layers, layers, strategy)
    rows = features(tokenizer, model, data.train, recipe.max_length)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
        return TeacherStates(matched, first_token_states(tokenizer, model, rows, matched))


def logits_of(
    source: str, data: TaskData, examples: Examples, max_length: int, *, bf16: bool = False
) -> NDArray[np.float32]:
    """Return the logits of a member of this task for any of its examples, float32 (examples, labels).

    `bf16` computes in bfloat16, for answers that are only learnt from.
    """
    tokenizer, model = load_member(source, data.labels, "teacher", several=data.several)
    model.eval().to(device())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return answers(tokenizer, model, features(tokenizer, model, examples, max_length))


def load_member(
    source: str, labels: tuple[str, ...], option: str, *, several: bool = False, attention: str | None = None
) -> tuple[PreTrainedTokenizerFast, Any]:
    """Load a fine-tuned member; raise InputError where that fails, and InvalidOption for one of another task.

    `several`: a text has any number of the labels.
    """
    check_member(source, labels, option, several=several)
    return load_tokenizer(source), load_classifier(source, attn_implementation=attention)


def check_member(source: str, labels: tuple[str, ...], option: str, *, several: bool = False) -> None:
    """Raise InputError for what is no member, and InvalidOption for one of another task; weights are not loaded."""
    settings = classifier_settings(source)
    if settings.labels != labels:
        raise InvalidOption(
            option, source, f"a member with the labels {', '.join(labels[:6])}, not {', '.join(settings.labels[:6])}"
        )
    if settings.several != several:
        kinds = {True: "several labels per text", False: "one label per text"}
        raise InvalidOption(option, source, f"a member that gives {kinds[several]}, as the data have")


def device() -> str:
    """Return where models are trained and run: where the Trainer puts them."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(
    base: str, labels: tuple[str, ...], layers: int | None, tokenizer: str | None = None, *, several: bool = False
) -> tuple[PreTrainedTokenizerFast, Any]:
    """Load an encoder, whole or its first k layers, with a new classifier; raise InputError where that fails.

    With `tokenizer`, the encoder is aligned to that one. `several`: a text has any number of the labels.
    """
    config = pretrained(AutoConfig, base)
    if not config.num_hidden_layers:
        raise InputError(f"{base}: found a network without layers, expected an encoder; train-dan trains such networks")
    own = load_tokenizer(base)
    target = None if tokenizer is None else load_tokenizer(tokenizer)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InvalidOption("layers", layers, f"1 to {config.num_hidden_layers}, the layers of {base}")
        keep_layers(config, range(layers))  # from_pretrained then takes the first k layers' weights only
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = PROBLEM_TYPES[several]  # the head is new, and so is its task
    for key in ("function_to_apply", "task_specific_params"):
        if getattr(config, key, None) is not None:
            setattr(config, key, None)
    model, loading = pretrained(
        AutoModelForSequenceClassification,
        base,
        config=config,
        ignore_mismatched_sizes=True,  # of the head; others are refused below
        output_loading_info=True,
        attn_implementation=TRAINED_ATTENTION,
    )
    _check_encoder(base, model, loading)
    check_tokens(base, own, model)
    return (own, model) if target is None else (_of_model(target, model), align(model, own, target).model)


def _of_model(tokenizer: PreTrainedTokenizerFast, model: Any) -> PreTrainedTokenizerFast:
    """Have another model's tokenizer return what this one takes: MPNet has no token types, and BERT's has."""
    taken = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in taken]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _check_encoder(base: str, model: Any, loading: Mapping[str, Any]) -> None:
    """Raise InputError if weights of the encoder are missing or have other shapes; the head and its pooler are new."""
    others = [*loading["missing_keys"], *mismatched_weights(loading)]
    lacking = sorted(key for key in others if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key)
    if lacking:
        raise InputError(
            f"{base}: has no weights of the right shape for {len(lacking)} parts of a {type(model).__name__} "
            f"({', '.join(lacking[:3])}); expected those of the encoder that config.json describes"
        )


class ObjectiveTrainer(Trainer):  # type: ignore[misc]  # the library has no types
    """A Trainer whose loss is an `Objective`; its values for each example are in the batches."""

    def __init__(self, objective: Objective, **settings: Any) -> None:
        super().__init__(**settings)
        self._objective = objective

    def _get_grad_norm(self, model: Any, grad_norm: float | None = None) -> float | None:
        """Return no norm where gradients are not clipped: transformers 5 would log it, and sparse ones have none."""
        return super()._get_grad_norm(model, grad_norm) if self.args.max_grad_norm else grad_norm

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch; of validation batches, which carry no more than labels, the cross entropy."""
        difficulty, teacher, states = (inputs.pop(name, None) for name in EXTRAS)
        outputs = model(**inputs) if states is None else model(**inputs, output_hidden_states=True)
        loss, objective = outputs.loss, self._objective
        several = model.config.problem_type == PROBLEM_TYPES[True]
        if teacher is not None:
            soft = (distillation_of_sets if several else distillation)(outputs.logits, teacher, objective.temperature)
            loss = (1 - objective.distill_weight) * loss + objective.distill_weight * soft
        if states is not None:
            ours = torch.stack([layer[:, 0] for layer in outputs.hidden_states[1:-1]], 1)
            loss = loss + objective.patient_weight * patient_distillation(ours, states)
        if difficulty is not None:
            regularization = difficulty_aware_regularization(
                outputs.logits, difficulty, objective.dar_margin, several=several
            )
            loss = loss + objective.dar_weight * regularization
        return (loss, outputs) if return_outputs else loss


def member_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    recipe: Recipe,
    objective: Objective,
    work: Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    """Return what trains a member on its objective and keeps the checkpoint that is best on validation.

    `optimizer`: None for AdamW.
    """
    train = features(tokenizer, model, data.train, recipe.max_length)
    states = None if objective.patient is None else objective.patient.states
    for name, values in zip(EXTRAS, (objective.difficulty, objective.teacher, states), strict=True):
        for example, value in zip(train, [] if values is None else values, strict=values is not None):
            example[name] = torch.as_tensor(value)
    return ObjectiveTrainer(
        objective,
        model=model,
        args=validated_arguments(
            recipe, work, len(data.train), data.metric, **({} if optimizer is None else _OF_NETWORKS)
        ),
        optimizers=(optimizer, None),
        train_dataset=train,
        eval_dataset=features(tokenizer, model, data.validation, recipe.max_length),
        data_collator=collator(tokenizer),
        compute_metrics=_measured_sets if data.several else lambda outcome: _measured(outcome, len(data.labels)),
    )


def validated_arguments(recipe: Recipe, work: Path, examples: int, metric: str, **more: Any) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe that validates, and keeps the checkpoint with the best `metric`."""
    steps_per_epoch = -(-examples // recipe.batch_size)
    interval = max(1, min(steps_per_epoch, int(steps_per_epoch * recipe.epochs)) // recipe.evaluations_per_epoch)
    return arguments(
        recipe,
        work,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,  # the best so far and the last
        logging_steps=min(interval, _LOGGED),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        **more,
    )


def arguments(recipe: Recipe, work: Path, *, group_by_length: bool = True, **more: Any) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe."""
    return training_arguments(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup_ratio=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        group_by_length=group_by_length,
        seed=recipe.seed,
        bf16=recipe.bf16,
        optim=OPTIMIZER,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # the objective's columns are not the model's
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        **more,
    )


def _cuts(logits: NDArray[np.float32], labels: NDArray[Any]) -> tuple[float, ...]:
    return best_cuts(MultiLabel(()).probabilities(logits), labels > 0)


def _measured_sets(outcome: EvalPrediction) -> dict[str, float]:
    """Return the metrics of several labels at the best cuts: how well they can be told apart."""
    found = MultiLabel(_cuts(outcome.predictions, outcome.label_ids))
    answers, labels = found.answers(found.probabilities(outcome.predictions)), outcome.label_ids > 0
    return {
        "accuracy": float(found.equal(answers, labels).mean()),
        "f1": f1_of_sets(labels, answers),
        "f1_micro": f1_of_sets(labels, answers, micro=True),
    }


def _measured(outcome: EvalPrediction, classes: int) -> dict[str, float]:
    predictions = np.argmax(outcome.predictions, axis=-1)
    return {
        "accuracy": accuracy(outcome.label_ids, predictions),
        "f1": f1(outcome.label_ids, predictions, classes),
    }
