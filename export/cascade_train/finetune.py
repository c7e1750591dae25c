"""Fine-tune one member: any Hugging Face encoder, whole or its first k layers, with the paper's recipe.

The training loop is transformers' `Trainer`. This module gives it the recipe and makes two promises of ours: a
killed run resumes where it was, and the member's folder appears only once it is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cascade_rt.errors import CascadeError, InputError
from cascade_rt.metrics import accuracy, f1
from cascade_rt.records import write_json
from cascade_train import RECORD, VALIDATION
from cascade_train.tasks import Examples, TaskData


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the defaults are the paper's (section 4.1), lengths and batches BERT's usual ones."""

    epochs: float = 10
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    evaluations_per_epoch: int = 1  # validate, and leave a checkpoint to resume from, this often

    def __post_init__(self) -> None:
        """Raise InputError for a value that no training can have."""
        for name, lowest, highest in (
            ("epochs", 1e-3, 1e4),
            ("learning_rate", 0, 1),
            ("batch_size", 1, 1e5),
            ("max_length", 3, 1e6),
            ("warmup_ratio", 0, 1),
            ("weight_decay", 0, 1),
            ("seed", 0, 2**32 - 1),
            ("evaluations_per_epoch", 1, 1e4),
        ):
            value = getattr(self, name)
            if not lowest <= value <= highest:
                option = name.replace("_", "-")
                raise InputError(f"found --{option} {value}, expected a number from {lowest:g} to {highest:g}")


def finetune(base: str, data: TaskData, output: Path, *, layers: int | None = None, recipe: Recipe) -> dict[str, Any]:
    """Fine-tune `base` (a hub id or a local folder) on `data` and write a Hugging Face folder to `output`.

    `layers` keeps only the first k encoder layers (the paper's BERT-kL, section 2.1). The folder holds the
    checkpoint that was best on validation, and what `RECORD` tells. A run that was killed resumes from its last
    checkpoint when it is started again with the same arguments. Returns the record; raises CascadeError where
    `output` exists, another run's work is in the way, or `base` cannot be loaded.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another output folder, or delete it to train anew")
    work = output.with_name(output.name + ".training")
    run = {
        "base": str(base),
        "layers": layers,
        "task": data.name,
        "labels": list(data.labels),
        "pair": data.pair,
        "max_length": recipe.max_length,
        "recipe": asdict(recipe),
        "data": {"train": _described(data.train), "validation": _described(data.validation)},
    }
    set_seed(recipe.seed)
    tokenizer, model = _load(base, data.labels, layers)
    longest = int(min(model.config.max_position_embeddings, tokenizer.model_max_length))
    if recipe.max_length > longest:
        raise InputError(f"found --max-length {recipe.max_length}, expected at most {longest}, what {base} takes")
    _claim(work, run)
    trainer = _trainer(model, tokenizer, data, recipe, work)
    resume = _last_whole_checkpoint(work)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    record = run | {
        "metric": data.metric,
        "validation": {"best": trainer.state.best_metric, "history": history},
        "steps": trainer.state.global_step,
        "versions": {name: version(name) for name in ("torch", "transformers", "cascade-rt")},
    }
    finished = work / "model"
    shutil.rmtree(finished, ignore_errors=True)
    trainer.save_model(str(finished))
    (finished / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to anyone
    tokenizer.save_pretrained(finished)
    write_json(finished / RECORD, record)
    _write_validation(finished / VALIDATION, data)
    finished.rename(output)
    shutil.rmtree(work)
    return record


def _described(examples: Examples) -> dict[str, Any]:
    return {"rows": len(examples), "sha256": examples.digest()}


def _claim(work: Path, run: dict[str, Any]) -> None:
    """Make the working folder, or check that the one that stands is of this same run."""
    settings = work / "run.json"
    if any(work.glob("checkpoint-*")) and settings.is_file():
        other = json.loads(settings.read_text("utf-8"))
        differing = [key for key in run if run[key] != other.get(key)]
        if differing:
            key = differing[0]
            raise CascadeError(
                f"{work} holds an unfinished run with another {key} (found {other.get(key)}, asked for {run[key]}); "
                "finish that one with its own arguments, or delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(settings, run)


def _load(base: str, labels: tuple[str, ...], layers: int | None) -> tuple[PreTrainedTokenizerFast, Any]:
    try:
        config = AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # a folder can be broken in any way, and each library has errors of its own
        raise _no_base(base, error) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{base}: has no fast tokenizer (tokenizer.json); cascade-rt needs one")
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InputError(
                f"found --layers {layers}, expected 1 to {config.num_hidden_layers}, the layers that {base} has"
            )
        config.num_hidden_layers = layers  # from_pretrained then takes the first k layers' weights only
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    except Exception as error:
        raise _no_base(base, error) from None
    return tokenizer, model


def _no_base(base: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"cannot load the base model {base!r} ({reason}); expected a Hugging Face folder, or a hub id and a network"
    )


def _trainer(model: Any, tokenizer: PreTrainedTokenizerFast, data: TaskData, recipe: Recipe, work: Path) -> Trainer:
    steps_per_epoch = -(-len(data.train) // recipe.batch_size)
    interval = max(1, min(steps_per_epoch, int(steps_per_epoch * recipe.epochs)) // recipe.evaluations_per_epoch)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup_ratio=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        group_by_length=True,
        seed=recipe.seed,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,  # the best so far and the last
        logging_steps=interval,
        load_best_model_at_end=True,
        metric_for_best_model=data.metric,
        greater_is_better=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=_features(tokenizer, data.train, recipe.max_length),
        eval_dataset=_features(tokenizer, data.validation, recipe.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda outcome: _measured(outcome, len(data.labels)),
    )


def _features(tokenizer: PreTrainedTokenizerFast, examples: Examples, max_length: int) -> list[dict[str, Any]]:
    """Tokenize each example once, unpadded: the collator pads to the longest of a batch."""
    single = [text if isinstance(text, str) else text[0] for text in examples.texts]
    second = [text[1] for text in examples.texts if not isinstance(text, str)] or None
    encoded = tokenizer(single, second, truncation=True, max_length=max_length)
    return [
        {name: values[row] for name, values in encoded.items()} | {"label": label}
        for row, label in enumerate(examples.labels)
    ]


def _measured(outcome: EvalPrediction, classes: int) -> dict[str, float]:
    predictions = np.argmax(outcome.predictions, axis=-1)
    return {
        "accuracy": accuracy(outcome.label_ids, predictions),
        "f1": f1(outcome.label_ids, predictions, classes),
    }


def _last_whole_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, and delete those that a kill cut short."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:  # the Trainer writes its state last
            whole.append((int(json.loads((folder / "trainer_state.json").read_text("utf-8"))["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def _write_validation(path: Path, data: TaskData) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for text, label in zip(data.validation.texts, data.validation.labels, strict=True):
            fields = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
            stream.write(json.dumps(fields | {"label": data.labels[label]}, ensure_ascii=False) + "\n")
