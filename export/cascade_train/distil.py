"""General distillation: a complete k-layer encoder that learns a big encoder's hidden states on plain text.

For encoders without a small sibling. The student has some of the big encoder's layers, picked across its depth, and its
embeddings; it is trained to match the last hidden states. The result is a normal encoder folder, to fine-tune with
`cascade-rt train`. The training loop is transformers' `Trainer`; a killed run resumes where it was.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io.fields import is_blank
from cascade_rt.io.readers import AS_USUAL, Reading, read_examples
from cascade_train.compat import training_arguments
from cascade_train.finetune import (
    OPTIMIZER,
    RECIPE_RANGES,
    TRAINED_ATTENTION,
    check_length,
)
from cascade_train.hardware import bf16_pays
from cascade_train.layers import embeddings_name, keep_layers, layer_lists
from cascade_train.losses import hidden_state_error, mean_vector_cosine, relation_divergence
from cascade_train.progress import alive
from cascade_train.ranges import check_ranges
from cascade_train.sources import check_tokens, load_tokenizer, pretrained
from cascade_train.work import claim, finish, last_whole_checkpoint, trained, work_folder


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation."""

    epochs: float = 1
    steps: int | None = None
    """Train for this many steps instead of `epochs`."""
    learning_rate: float = 6e-4
    batch_size: int = 64
    max_length: int = 128
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0
    relations: bool = False
    """Learn the relations of the last layer's queries, keys and values too, as in MiniLMv2."""
    train_embeddings: bool = False
    """Train the embeddings too; by default they stay those of the big encoder."""
    bf16: bool | None = None
    """Compute in bfloat16; None measures whether that is faster here."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        check_ranges(self, {**RECIPE_RANGES, "steps": (1, 1e9)})


_EVALUATIONS = 10  # in a run, each with a checkpoint
_SAVED_EVERY = 300.0  # seconds between two checkpoints, at most
_HELD_OUT = 0.01  # of the texts, for validation
_MOST_HELD_OUT = 1000
_LOGGED = 20  # steps between two updates of the loss on the progress bar
_TOKENIZED = 10_000  # texts at a time
_POOL = 50  # batches that are sorted by length together
_RELATION_HEAD = 16  # MiniLMv2 has 48 relation heads for a hidden size of 768
# The last names of the linear modules that make queries, keys and values, in the families that have three.
_PROJECTIONS = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "k", "v"),  # MPNet
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa v2
    ("q_proj", "k_proj", "v_proj"),
)


def distil(
    base: str,
    texts: Sequence[Path | str],
    output: Path,
    *,
    layers: int,
    recipe: Distillation,
    reading: Reading = AS_USUAL,
) -> dict[str, Any]:
    """Distil `base` (a folder or hf:NAME) into an encoder of `layers` layers; write it to `output`.

    `texts`: files with one text per record, in any format that `read_examples` reads, and as `reading` says. `output`
    is a Hugging Face encoder folder with the record, cascade_train.json. A killed run resumes from its last checkpoint
    when it is called again with the same arguments. Returns the record; raises CascadeError if `output` exists, another
    run's unfinished work is there, there are fewer than two texts, or `base` cannot be loaded or has no list of layers.
    """
    work = work_folder(output, "distil")
    set_seed(recipe.seed)
    tokenizer, teacher = load_encoder(base)
    deep = teacher.config.num_hidden_layers
    if not 1 <= layers < deep:
        raise InvalidOption("layers", layers, f"1 to {deep - 1}, fewer than the {deep} layers of {base}")
    check_length(recipe.max_length, base, tokenizer, teacher)
    picked = pick_layers(deep, layers)
    student = make_student(teacher, picked, base)
    if recipe.relations:
        projections(teacher, base)  # fails before the texts are read
    with alive("reading the texts"):
        tokenized = Tokenized.read(tokenizer, texts, recipe.max_length, reading)
    train, validation = tokenized.split(recipe.seed)
    run = {
        "base": str(base),
        "layers": layers,
        "picked": picked,
        "texts": {"training": len(train), "validation": len(validation), "sha256": tokenized.sha256},
        # Whether bfloat16 is faster may be measured differently when a run resumes.
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "bf16"},
    }
    claim(work, run)
    recipe = replace(recipe, bf16=bf16_pays() if recipe.bf16 is None else recipe.bf16)
    if not recipe.train_embeddings:
        _freeze_embeddings(student)
    pad = tokenizer.pad_token_id or 0  # hidden by the attention mask
    trainer = DistillationTrainer(
        teacher,
        validation,
        recipe,
        pad,
        base,
        model=student,
        args=_arguments(recipe, work, len(train), new=last_whole_checkpoint(work) is None),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=lambda rows: collate(rows, pad),
    )
    trainer.add_callback(_SaveByTime())
    facts = trained(trainer, output, "mse", "cosine")

    def history() -> list[dict[str, Any]]:
        return [entry for entry in trainer.state.log_history if "eval_mse" in entry]

    if history()[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    last = history()[-1]
    record = run | {
        "bf16": recipe.bf16,
        "tokens": int(train.lengths.sum()),
        "teacher_variance": trainer.held_out.variance,
        "validation": {"mse": last["eval_mse"], "cosine": last["eval_cosine"], "history": history()},
        **facts,
    }
    finish(work, output, student.save_pretrained, tokenizer, record)
    return record


def load_encoder(base: str) -> tuple[PreTrainedTokenizerFast, Any]:
    """Load an encoder without a head, and its tokenizer; raise InputError where that fails."""
    config = pretrained(AutoConfig, base)
    tokenizer = load_tokenizer(base)
    model = pretrained(AutoModel, base, config=config)
    check_tokens(base, tokenizer, model)
    return tokenizer, model.eval().requires_grad_(False)


def pick_layers(deep: int, layers: int) -> list[int]:
    """Return which of `deep` layers a student of `layers` layers starts from: 0-based, ascending, evenly spread.

    The first and the last are among them; of a single layer, it is the last, whose output the student has to match.
    """
    if layers == 1:
        return [deep - 1]
    gaps = layers - 1
    return [(2 * place * (deep - 1) + gaps) // (2 * gaps) for place in range(layers)]  # rounded half up


def make_student(teacher: Any, picked: Sequence[int], base: str) -> Any:
    """Return an encoder with the picked layers of `teacher`, and all else as the teacher has it.

    Works for every family whose layers are in lists of modules as long as the encoder is deep; raises InputError for
    others.
    """
    lists = [f"{name}." for name, _ in layer_lists(teacher)]
    config = copy.deepcopy(teacher.config)
    keep_layers(config, picked)
    weights: dict[str, Tensor] = {}
    for name, weight in teacher.state_dict().items():
        prefix = next((prefix for prefix in lists if name.startswith(prefix)), None)
        if prefix is None:
            weights[name] = weight
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        weights |= {f"{prefix}{place}.{rest}": weight for place, layer in enumerate(picked) if layer == int(index)}
    student = AutoModel.from_config(config, attn_implementation=TRAINED_ATTENTION, trust_remote_code=False)
    try:
        if not lists:
            raise RuntimeError("it has no list of layers")
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{base}: cannot take single layers out of a {type(teacher).__name__}; expected a family whose encoder "
            "layers are a list of modules, as BERT, RoBERTa, DistilBERT, MPNet, ELECTRA"
        ) from error
    return student


def projections(model: Any, base: str) -> list[nn.Linear]:
    """Return the linear modules of the last layer's queries, keys and values; raise InputError if there are none."""
    for _, layers in layer_lists(model):
        found = {
            name.rpartition(".")[2]: module
            for name, module in layers[-1].named_modules()
            if isinstance(module, nn.Linear)
        }
        for names in _PROJECTIONS:
            if all(name in found for name in names):
                return [found[name] for name in names]
    raise InputError(
        f"{base}: relations need separate queries, keys and values, and a {type(model).__name__} has none; distil "
        "without relations"
    )


def _freeze_embeddings(model: Any) -> None:
    """Freeze the module that holds the word embeddings: with BERT, positions, token types and their norm too."""
    name = embeddings_name(model)
    (model.get_submodule(name) if name else model.get_input_embeddings()).requires_grad_(False)


@dataclass(frozen=True)
class Tokenized:
    """Texts as token ids, 4 bytes a token; item `i` is the ids of one text, int32 (tokens,)."""

    tokens: NDArray[np.int32]
    """All texts, one after another."""
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sha256: str
    """Hash of the texts that were read."""

    @staticmethod
    def read(
        tokenizer: PreTrainedTokenizerFast,
        files: Sequence[Path | str],
        max_length: int,
        reading: Reading = AS_USUAL,
    ) -> Tokenized:
        """Read and tokenize files; skip blank texts and repetitions; raise InputError for fewer than two texts."""
        parts: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        digest = hashlib.sha256()
        distinct = _distinct(files, reading)
        while some := list(islice(distinct, _TOKENIZED)):
            rows = tokenizer(some, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
            parts.append(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))
            lengths += map(len, rows)
            digest.update("\0".join([*some, ""]).encode("utf-8", "surrogatepass"))
        if len(lengths) < 2:
            names = ", ".join(map(str, files))
            raise InputError(f"{names}: found {len(lengths)} texts, expected at least 2; thousands are useful")
        sizes = np.array(lengths, dtype=np.int64)
        return Tokenized(np.concatenate(parts), np.cumsum(sizes) - sizes, sizes, digest.hexdigest())

    def split(self, seed: int) -> tuple[Tokenized, Tokenized]:
        """Return the texts to train on, and those held out for validation."""
        held = max(1, min(_MOST_HELD_OUT, int(_HELD_OUT * len(self))))
        rows = np.random.default_rng(seed).permutation(len(self))
        return self._take(np.sort(rows[held:])), self._take(np.sort(rows[:held]))

    def _take(self, rows: NDArray[np.int64]) -> Tokenized:
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        start = self.starts[row]
        return self.tokens[start : start + self.lengths[row]]


def _distinct(files: Sequence[Path | str], reading: Reading) -> Iterator[str]:
    """Yield the texts of files without blank ones and repetitions; only their hashes are kept."""
    seen: set[bytes] = set()
    for file in files:
        for example in read_examples(file, reading.of_texts(file), pair=False):
            text = str(example.text).strip()
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if not is_blank(text) and key not in seen:
                seen.add(key)
                yield text


class _BatchesOfLikeLength(torch.utils.data.Sampler[int]):  # type: ignore[misc]  # the library has no types
    """Row numbers, so that each batch has texts of like length; batches come in random order.

    `group_by_length` of the Trainer, which sorts by length over 50 batches, would train in waves of long and short
    texts. Each epoch's order depends on the seed and the epoch alone, so a resumed run sees the same batches.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the data loader calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        rows = random.permutation(len(self._lengths))
        whole = len(rows) - len(rows) % self._batch_size
        pools = np.split(rows[:whole], range(_POOL * self._batch_size, whole, _POOL * self._batch_size))
        ordered = np.concatenate([pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools])
        batches = random.permutation(ordered.reshape(-1, self._batch_size))
        yield from batches.ravel().tolist()
        yield from rows[whole:].tolist()  # the last batch is the one that is not full


def collate(rows: Sequence[NDArray[np.int32]], pad: int) -> dict[str, Tensor]:
    """Return a batch of texts: `input_ids` and `attention_mask`, int64 (texts, tokens), padded on the right."""
    ids = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _batches(rows: Tokenized, pad: int, size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Yield all texts in batches, the short ones first."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), size):
        batch = collate([rows[row] for row in order[start : start + size]], pad)
        yield {name: values.to(device) for name, values in batch.items()}


@dataclass(frozen=True)
class HeldOut:
    """The teacher's states of the validation texts: kept in memory, since it takes longer than the student."""

    batches: Sequence[dict[str, Tensor]]
    targets: Sequence[Tensor]
    """The teacher's last hidden states of each batch, float32 (texts, tokens, hidden)."""
    variance: float
    """Variance of those of real tokens around their mean vector, the mean over dimensions."""

    @staticmethod
    def of(teacher: Any, batches: Iterator[dict[str, Tensor]]) -> HeldOut:
        """Run the teacher on all batches."""
        kept = list(batches)
        with torch.no_grad():
            targets = [teacher(**batch).last_hidden_state for batch in kept]
        pairs = zip(kept, targets, strict=True)
        states = torch.cat([target[batch["attention_mask"].bool()] for batch, target in pairs])
        return HeldOut(kept, targets, float(states.var(0, correction=0).mean()))

    def compare(self, student: Any) -> tuple[float, float]:
        """Return the error of a student's hidden states (over all tokens) and the mean cosine of its mean vectors."""
        error, tokens = 0.0, 0
        cosines: list[float] = []
        student.eval()
        for batch, target in zip(self.batches, self.targets, strict=True):
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                states = student(**batch).last_hidden_state
                error += float(hidden_state_error(states, target, mask, self.variance)) * int(mask.sum())
                cosines += mean_vector_cosine(states, target, mask).tolist()
            tokens += int(mask.sum())
        return error / tokens, float(np.mean(cosines))


class DistillationTrainer(Trainer):  # type: ignore[misc]  # the library has no types
    """A Trainer whose student learns a teacher's hidden states; it has no labels."""

    def __init__(
        self, teacher: Any, validation: Tokenized, recipe: Distillation, pad: int, base: str, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._recipe = recipe
        self._teacher = teacher.to(self.args.device)
        self.held_out = HeldOut.of(teacher, _batches(validation, pad, recipe.batch_size, self.args.device))
        self._captured: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        self._heads = 0
        if recipe.relations:
            for name, model in (("student", self.model), ("teacher", teacher)):
                for module in projections(model, base):
                    module.register_forward_hook(self._capture(name))
            width = projections(teacher, base)[0].out_features
            heads = teacher.config.num_attention_heads
            self._heads = heads if width % _RELATION_HEAD else width // _RELATION_HEAD

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: hidden states, mean vectors and, if wanted, relations."""
        model.eval()  # without dropout: the teacher's states are exact, and no text is seen often
        mask = inputs["attention_mask"].bool()
        for vectors in self._captured.values():
            vectors.clear()
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=bool(self._recipe.bf16)):
            outputs = model(**inputs)
            with torch.no_grad():
                target = self._teacher(**inputs).last_hidden_state
        states = outputs.last_hidden_state
        loss = hidden_state_error(states, target, mask, self.held_out.variance)
        loss = loss + 1 - mean_vector_cosine(states, target, mask).mean()
        if self._recipe.relations:
            pairs = zip(self._captured["student"], self._captured["teacher"], strict=True)
            loss = loss + sum(relation_divergence(*pair, mask, self._heads) for pair in pairs) / len(_PROJECTIONS[0])
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compare the student with the teacher on the held-out texts, in float32."""
        error, cosine = self.held_out.compare(self.model)
        metrics = {"eval_mse": error, "eval_cosine": cosine}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, *_: Any) -> _BatchesOfLikeLength:
        return _BatchesOfLikeLength(self.train_dataset.lengths, self._recipe.batch_size, self._recipe.seed)

    def _capture(self, name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            self._captured[name].append(output)

        return keep


class _SaveByTime(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Writes a checkpoint when the last one is `_SAVED_EVERY` seconds old."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._saved = time.monotonic()

    def on_save(self, *_: Any, **__: Any) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._saved >= _SAVED_EVERY:
            control.should_save = True


def _arguments(recipe: Distillation, work: Path, texts: int, *, new: bool) -> TrainingArguments:
    """Return the Trainer's arguments; a `new` run is validated before its first step too."""
    total = recipe.steps or int(np.ceil(recipe.epochs * -(-texts // recipe.batch_size)))
    interval = max(1, total // _EVALUATIONS)
    return training_arguments(
        group_by_length=False,
        output_dir=str(work),
        max_steps=total,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        optim=OPTIMIZER,
        warmup_ratio=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        per_device_train_batch_size=recipe.batch_size,
        seed=recipe.seed,
        eval_strategy="steps",
        eval_steps=interval,
        eval_on_start=new,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=1,
        logging_steps=min(interval, _LOGGED),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
