"""The JSON files of a checkpoint, and the settings there that cascade-rt does not follow, each refused by name.

The files are read without torch and transformers, before either sees the folder: nothing in it has run then.
docs/reference/checkpoints.md lists all settings that change answers, those that are followed included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cascade_rt.errors import CascadeError, InferenceError, InputError, first_line

CONFIG, TOKENIZER_CONFIG, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
MODULES, SENTENCE_TRANSFORMERS = "modules.json", "config_sentence_transformers.json"
SETFIT = ("config_setfit.json", "model_head.pkl")
DEFAULT_LABELS = 2
"""Labels of a config.json that names none, as in transformers."""

PROBLEM_TYPES = {False: "single_label_classification", True: "multi_label_classification"}
"""The `problem_type` of a classifier whose texts have one label, and of one whose texts have any number."""

_CLASSIFIER = "ForSequenceClassification"
_TRAIN = "fine-tune this folder, as the base, with cascade-rt train"
_JSON_NAMES: Mapping[type, str] = {dict: "object", list: "array"}
_TAKEN_OVER = ("eurobert",)  # models whose code transformers took over from their repositories
_SHOWN, _LINE = 60, 240  # characters of a setting's value, and of another library's message


@contextmanager
def guarded(source: str, action: str, remedy: str) -> Iterator[None]:
    """Turn what other libraries raise about a checkpoint into one InputError that names it and keeps the cause.

    `action`: "cannot ..." of the message; `remedy`: its end. Errors of cascade-rt pass unchanged; running out of memory
    becomes an InferenceError, because nothing about the checkpoint would mend it.
    """
    try:
        yield
    except CascadeError:
        raise
    except MemoryError as error:
        raise InferenceError(f"{source}: {action}, memory ran out; free memory and try again") from error
    except Exception as error:  # a folder can be broken in many ways, and each library has its own errors
        raise InputError(f"{source}: {action} ({_shown(first_line(error), _LINE)}); {remedy}") from error


@dataclass(frozen=True)
class Settings:
    """The JSON files of a checkpoint: `config` is empty for a folder that only has a tokenizer."""

    source: str
    folder: Path
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    def read(self, name: str) -> dict[str, Any]:
        """Return another JSON file of the folder; empty if there is none."""
        return _json(self.source, self.folder / name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names by class id, as transformers reads them; InputError unless ids count from 0 without gaps."""
        named = self.config.get("id2label")
        if named is None:
            count = self.config.get("num_labels", self.config.get("_num_labels", DEFAULT_LABELS))
            if isinstance(count, bool) or not isinstance(count, int):
                raise self.refusal(CONFIG, "num_labels", count, "a number of labels")
            named = {str(index): f"LABEL_{index}" for index in range(count)}
        if not isinstance(named, dict) or not all(key.isdecimal() for key in named):
            raise self.refusal(CONFIG, "id2label", named, 'the name of each label by its id: {"0": "no", "1": "yes"}')
        by_id = {int(key): name for key, name in named.items()}
        if sorted(by_id) != list(range(len(named))):
            raise InputError(
                f"{self.source}: {CONFIG}: found labels with the ids {_shown(sorted(by_id))}; expected all "
                "from 0, the places of their logits; name and number them so in id2label and label2id"
            )
        names = [by_id[index] for index in range(len(by_id))]
        if wrong := [name for name in names if not isinstance(name, str | int | float)]:
            raise self.refusal(CONFIG, "id2label", wrong[0], "names of labels as text")
        labels = tuple(name if isinstance(name, str) else json.dumps(name) for name in names)
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise InputError(
                f"{self.source}: found the labels {_shown(', '.join(labels))}; expected at least two, with different "
                "names"
            )
        return labels

    def refusal(self, file: str, key: str, found: object, expected: str) -> InputError:
        """Return the error of a setting that cannot be followed."""
        written = json.dumps(found, ensure_ascii=False, default=str)
        return InputError(f"{self.source}: {file}: found {_shown(f'{key} {written}')}; expected {expected}")

    def check_code(self, classes: Collection[str]) -> None:
        """Raise InputError if one of these Auto classes is code of the repository, which cascade-rt never runs."""
        for file, found in ((CONFIG, self.config), (TOKENIZER_CONFIG, self.tokenizer)):
            named = found.get("auto_map") or {}
            if not isinstance(named, dict):  # as tokenizers were written once
                named = {"AutoTokenizer": named}
            for name in classes:
                if named.get(name) and not (file == CONFIG and self._is_taken_over()):
                    by = "install transformers 5, which has it" if self._kind in _TAKEN_OVER else "use another one"
                    raise InputError(
                        f"{self.source}: {file}: found auto_map for {name}, code of the repository "
                        f"({_shown(named[name])}), which cascade-rt never runs; expected a model that transformers has "
                        f"itself; {by}, or export it to ONNX elsewhere and give that folder"
                    )

    @property
    def _kind(self) -> str:
        return str(self.config.get("model_type"))

    def _is_taken_over(self) -> bool:
        """Return whether the installed transformers has the same code as the repository, and so runs its own."""
        return self._kind in _TAKEN_OVER and bool(
            find_spec("transformers") and find_spec(f"transformers.models.{self._kind}")
        )

    def check_weights(self) -> None:
        """Raise InputError for weights that transformers would read otherwise than they are meant, or not at all."""
        self._check(_WEIGHTS)
        if (self.folder / ADAPTER).is_file():
            base = self.read(ADAPTER).get("base_model_name_or_path")
            of = f" of {_shown(base)}" if base else ""
            raise InputError(
                f"{self.source}: found {ADAPTER}, an adapter{of}; expected one whole model; merge it into its base "
                "with peft (merge_and_unload), and save that and the tokenizer in a new folder"
            )

    @property
    def several(self) -> bool:
        """True if a text has any number of labels, each with its own probability, a sigmoid."""
        problem = self.config.get("problem_type")
        if problem is None:
            return any(_class(found) == "sigmoid" for found in self._activations.values())
        return bool(problem == PROBLEM_TYPES[True])

    @property
    def _activations(self) -> dict[str, object]:
        """The function of its answers that a CrossEncoder of sentence-transformers names, by setting."""
        found = self.config.get("sentence_transformers")
        named = found.get("activation_fn") if isinstance(found, dict) else None
        once = "sbert_ce_default_activation_function"
        return {"sentence_transformers": named, once: self.config.get(once)}

    def check_task(self) -> None:
        """Raise InputError unless the model is a classifier: of one label per text, softmax, or several, sigmoid."""
        self._check_other_libraries()
        self._check_one_score()
        self._check(_TASK)
        wanted = "sigmoid" if self.several else "softmax"
        functions = self._activations | {"function_to_apply": self.config.get("function_to_apply")}
        for key, found in functions.items():
            if found is not None and _class(found) not in (wanted, "identity"):
                remedy = f"{wanted}, as of problem_type {PROBLEM_TYPES[self.several]}; correct the one that is wrong"
                raise self.refusal(CONFIG, key, found, remedy)
        names = self.architectures
        if names and not any(name.endswith(_CLASSIFIER) for name in names):
            raise InputError(
                f"{self.source}: not a fine-tuned classifier ({CONFIG}: found the architecture "
                f"{_shown(', '.join(names))}, expected one that ends in {_CLASSIFIER}); fine-tune it with "
                "cascade-rt train"
            )

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes of transformers that the model was saved as; none where config.json does not say."""
        named = self.config.get("architectures") or ()
        return tuple(map(str, [named] if isinstance(named, str) else named))

    def _check_other_libraries(self) -> None:
        """Raise InputError for models that are more than the part which transformers reads."""
        if head := next((name for name in SETFIT if (self.folder / name).is_file()), None):
            raise InputError(
                f"{self.source}: found {head}, a model of SetFit, whose classifier is pickled: cascade-rt never opens "
                f"it; {_TRAIN} on the same texts"
            )
        if not (self.folder / MODULES).is_file():
            return
        modules = _parsed(self.source, self.folder / MODULES, list)
        if not any(name.endswith(_CLASSIFIER) for name in self.architectures):
            raise InputError(
                f"{self.source}: found {MODULES}, an encoder of sentence-transformers without a classifier; {_TRAIN}"
            )
        if len(modules) > 1:
            raise InputError(
                f"{self.source}: {MODULES}: found {len(modules)} modules, expected a classifier alone; {_TRAIN}"
            )
        if prompt := self.read(SENTENCE_TRANSFORMERS).get("default_prompt_name"):
            raise self.refusal(
                SENTENCE_TRANSFORMERS, "default_prompt_name", prompt, "null: cascade-rt adds no prompt to texts"
            )

    def _check_one_score(self) -> None:
        """Raise InputError for a model with one output."""
        named = self.config.get("id2label")
        if (len(named) if isinstance(named, dict) else self.config.get("num_labels")) == 1:
            raise InputError(
                f"{self.source}: {CONFIG}: found one label, a model of one score, as rerankers and regressions are; "
                "expected a classifier of two labels or more; fine-tune one with cascade-rt train, for instance on the "
                "labels no and yes"
            )

    def check_tokenizer(self) -> None:
        """Raise InputError for settings of the tokenizer that tokenizer.json, all that a bundle has, cannot hold.

        One that draws tokens at random is among them.
        """
        self._check(_TOKENIZER)
        model = self.read("tokenizer.json").get("model")
        if isinstance(model, dict) and model.get("dropout"):
            raise self.refusal(
                "tokenizer.json", "dropout", model["dropout"], "null: a text would get other tokens each time"
            )

    def _check(self, rules: Collection[_Rule]) -> None:
        for rule in rules:
            found = (self.config if rule.file == CONFIG else self.tokenizer).get(rule.key)
            if not (found is None or rule.fits(found)):
                raise self.refusal(rule.file, rule.key, found, rule.expected)


class _Rule(NamedTuple):
    """A setting, which of its values are followed, and the words for those."""

    file: str
    key: str
    fits: Callable[[Any], bool]
    expected: str


def _class(activation: object) -> str:
    """Return the name of a function, or of a class of torch, in small letters and without its module."""
    return str(activation).rpartition(".")[2].lower()


_TASK = (
    _Rule(
        CONFIG,
        "problem_type",
        lambda found: found in PROBLEM_TYPES.values(),
        f"{' or '.join(PROBLEM_TYPES.values())}: cascade-rt answers labels, not numbers; train a classifier",
    ),
    _Rule(
        CONFIG,
        "task_specific_params",
        lambda found: not (isinstance(found, dict) and {"text-classification", "sentiment-analysis"} & found.keys()),
        "none for text-classification: cascade-rt does not read them; move them to the top of the file",
    ),
)
_WEIGHTS = (
    _Rule(
        CONFIG,
        "quantization_config",
        lambda _: False,
        "weights of 32 or 16 bits; load it with transformers, dequantize() and save_pretrained, or use the original",
    ),
)
_TOKENIZER = (
    _Rule(
        TOKENIZER_CONFIG,
        "split_special_tokens",
        lambda found: found is False,
        "false: tokenizer.json cannot hold it; remove the line if the model was trained without it",
    ),
)


def read_settings(source: str, folder: Path) -> Settings:
    """Read the JSON files of a folder; `source`: its name in messages. Raise InputError for what is not JSON."""
    config = _json(source, folder / CONFIG)
    theirs = _json(source, folder / SENTENCE_TRANSFORMERS)
    if config and theirs.get("activation_fn"):  # of a CrossEncoder; older versions write it in config.json
        config["sentence_transformers"] = {"activation_fn": theirs["activation_fn"]}
    return Settings(source, folder, config, _json(source, folder / TOKENIZER_CONFIG))


def _json(source: str, file: Path) -> dict[str, Any]:
    return dict(_parsed(source, file, dict)) if file.exists() else {}


def _parsed(source: str, file: Path, kind: type) -> Any:
    """Return a JSON file whose content is of this kind; raise InputError for any other."""
    remedy = f"expected a JSON {_JSON_NAMES[kind]}; copy or download the file again"
    with guarded(source, f"cannot read {file.name}", remedy):
        found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, kind):
        raise InputError(f"{source}: cannot read {file.name} (found {type(found).__name__}); {remedy}")
    return found


def _shown(value: object, most: int = _SHOWN) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."
