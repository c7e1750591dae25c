"""Pretrained and fine-tuned models by name: local folders, and repositories of the Hugging Face hub as hf:NAME.

The one place where the offline stage opens a checkpoint. What decides about safety and answers is passed explicitly:
no code of the repository, no other pickled data than weights, float32, no weights of other shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import cascade_train.averaging  # noqa: F401 - registers its architecture
from cascade_rt.bundle.hub import repository
from cascade_rt.errors import InputError, MissingExtraError
from cascade_train.compat import MAJOR, quiet
from cascade_train.settings import CONFIG, Settings, guarded, read_settings

_SETTINGS = ("*.json", "*.txt", "*.model")
_WEIGHTS = (("model*.safetensors",), ("pytorch_model*.bin",))  # the second only where there is none of the first
_OF_OTHERS = {
    "*.gguf": "quantised weights of llama.cpp",
    "tf_model.h5": "weights of TensorFlow",
    "flax_model.msgpack": "weights of Flax",
    "openvino_model.xml": "a graph of OpenVINO",
}
_VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
_RUN_SO: dict[str, Any] = {
    "_attn_implementation": None,  # by the class; a folder may name a kernel, code that would be downloaded
    "return_dict": True,
    "torchscript": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Settings of config.json that are ours: they say how a model runs, and do not change its answers."""
_EXPECTED = "expected a Hugging Face folder whose files belong together; copy or download it again"


def pretrained(kind: Any, source: str, **settings: Any) -> Any:
    """Return `kind.from_pretrained` of a local folder, or of "hf:NAME" or "hf:NAME@REVISION" on the Hugging Face hub.

    `kind`: one of transformers' Auto classes. Without the prefix nothing is looked for on the hub, so a mistyped path
    never fetches a stranger's model. Raises InputError, which names the source, for whatever cannot be opened, and
    before anything is imported for a repository that has its own code for `kind`.
    """
    is_model = kind not in (AutoConfig, AutoTokenizer)
    found = settings_of(source, weights=is_model)
    if kind is AutoTokenizer:
        found.check_code(["AutoTokenizer"])
        found.check_tokenizer()
        _check_files(found)
        kind, settings = _read_by_4(found, kind, settings) if MAJOR < 5 else (kind, settings)
    else:
        _check_model(found, kind)
    if is_model:
        _check_weight_files(found)
        settings.setdefault("config", pretrained(AutoConfig, source))
        settings = {"dtype": "float32", "weights_only": True, "ignore_mismatched_sizes": False} | settings
    with guarded(source, "cannot be opened", _EXPECTED), quiet():
        opened = kind.from_pretrained(str(found.folder), trust_remote_code=False, **settings)
        if kind is AutoConfig:
            _check_read(found, opened)
            for key, value in _RUN_SO.items():
                setattr(opened, key, value)
    return opened


def load_classifier(source: str, **settings: Any) -> Any:
    """Open a fine-tuned classifier; raise InputError, which names the source, unless all weights are there and fit."""
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, on transformers 5 by name
    model, loading = pretrained(AutoModelForSequenceClassification, source, **checked, **settings)
    if mismatched := mismatched_weights(loading):
        raise InputError(f"{source}: cannot be opened (size mismatch for {', '.join(mismatched[:3])}); {_EXPECTED}")
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{source}: not a fine-tuned classifier (has no weights for {missing}); fine-tune it first")
    if not settings_of(source).architectures and _fits_tokens(model):
        raise InputError(
            f"{source}: {CONFIG}: found no architectures, and weights that fit a classifier of tokens too; expected "
            f'the model\'s class; if it is a classifier of texts, add "architectures": ["{type(model).__name__}"]'
        )
    return model


def _fits_tokens(model: Any) -> bool:
    """Return whether a classifier of tokens has the same weights, as ModernBERT's has."""
    try:
        with torch.device("meta"):
            other = AutoModelForTokenClassification.from_config(model.config, trust_remote_code=False)
    except ValueError:  # this architecture has none
        return False
    shapes, others = ({name: weight.shape for name, weight in one.named_parameters()} for one in (model, other))
    return shapes == others


def mismatched_weights(loading: Mapping[str, Any]) -> list[str]:
    """Return the names of weights whose shape is not the model's, from transformers' loading info."""
    found = loading["mismatched_keys"]  # by some versions with both shapes
    return sorted(key if isinstance(key, str) else key[0] for key in found)


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Open a tokenizer; raise InputError, which names the source, unless it is a fast one that can be opened."""
    tokenizer = pretrained(AutoTokenizer, source)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{source}: has no fast tokenizer (found {type(tokenizer).__name__}, expected tokenizer.json); use a "
            "model that has one"
        )
    return tokenizer


def settings_of(source: str, *, weights: bool = False) -> Settings:
    """Return the JSON files of a local folder, or of a repository, whose files are downloaded, with its `weights`."""
    asked = repository(source)
    folder = Path(source) if asked is None else _downloaded(source, *asked, weights=weights)
    if folder.is_file():
        raise InputError(f"{source}: found a file; expected the folder of a model: {folder.parent}")
    if not folder.is_dir():
        found = "is a file, expected a folder" if folder.exists() else "no such folder"
        is_name = repository(f"hf:{source}") is not None and not folder.exists()
        hint = f"on the Hugging Face hub it would be hf:{source}" if is_name else "check the path"
        raise InputError(f"{source}: {found}; {hint}")
    return read_settings(source, folder)


def classifier_settings(source: str) -> Settings:
    """Return the settings of a fine-tuned classifier; raise InputError for any other, or one with other tasks."""
    found = settings_of(source)
    _check_model(found, AutoModelForSequenceClassification)
    found.check_task()
    return found


def check_tokens(source: str, tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    """Raise InputError if the tokenizer has ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if beyond := sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows):
        index, token = beyond[0]
        raise InputError(
            f"{source}: its tokenizer has {len(beyond)} tokens without an embedding ({token!r} is {index}, expected "
            f"below {rows}); call resize_token_embeddings and train it, or remove the tokens"
        )


def check_weights(source: str, model: Any) -> None:
    """Raise InputError for weights that are NaN or infinite."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{source}: found NaN or infinity in its weights ({name}); train it again")


def _downloaded(source: str, name: str, revision: str | None, *, weights: bool) -> Path:
    """Return a repository's folder in the hub's cache, with these files of it.

    transformers is given this folder, not the name: it would ask the hub to convert repositories without safetensors.
    """
    remedy = "check the name, the network and, for a private one, HF_TOKEN"
    with guarded(source, "cannot be downloaded from the Hugging Face hub", remedy):

        def fetch(patterns: Sequence[str]) -> Path:
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

        folder = fetch(_SETTINGS)
        for patterns in _WEIGHTS if weights else ():
            folder = fetch(patterns)
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                break
        return folder


def _check_model(found: Settings, kind: Any) -> None:
    """Raise InputError for a folder without a model of transformers, or whose model is its own code."""
    found.check_weights()
    if not (found.folder / CONFIG).exists():
        _check_formats(found)
        models = sorted({file.parent.name for file in found.folder.glob(f"*/{CONFIG}") if _weight_files(file.parent)})
        hint = f"give a folder inside it: {', '.join(models[-3:])}" if models else _EXPECTED
        raise InputError(f"{found.source}: the folder has no {CONFIG}; {hint}")
    found.check_code(["AutoConfig", "AutoModel", kind.__name__])


def _weight_files(folder: Path) -> list[Path]:
    return [path for patterns in _WEIGHTS for pattern in patterns for path in folder.glob(pattern)]


def _check_formats(found: Settings) -> None:
    """Raise InputError if the folder holds the weights of another library."""
    files = [(path.name, what) for pattern, what in _OF_OTHERS.items() for path in sorted(found.folder.glob(pattern))]
    for name, what in files[:1]:
        raise InputError(
            f"{found.source}: found {name}, {what}; expected model.safetensors or pytorch_model.bin; use the original "
            "model, or load it with transformers and save_pretrained"
        )


def _check_weight_files(found: Settings) -> None:
    if not _weight_files(found.folder):
        _check_formats(found)
        raise InputError(
            f"{found.source}: has no weights; expected model.safetensors or pytorch_model.bin; load it with "
            "transformers and save_pretrained, or download it again"
        )


def _read_by_4(found: Settings, kind: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class and the settings by which transformers 4 reads a tokenizer as transformers 5 has written it."""
    if found.tokenizer.get("tokenizer_class") == "TokenizersBackend":
        kind = PreTrainedTokenizerFast
    if isinstance(extra := found.tokenizer.get("extra_special_tokens"), list):
        settings = {"extra_special_tokens": {}, "additional_special_tokens": extra} | settings
    return kind, settings


def _check_files(found: Settings) -> None:
    """Raise InputError for a folder without a tokenizer, and MissingExtraError for one that needs a package."""
    if (found.folder / "tokenizer.json").is_file():
        return
    files = sorted(path.name for pattern in _VOCABULARIES for path in found.folder.glob(pattern))
    if not files:
        raise InputError(
            f"{found.source}: has no tokenizer; expected tokenizer.json, or {', '.join(_VOCABULARIES)}; save that of "
            "its base model there (save_pretrained)"
        )
    if all(name.endswith(".model") for name in files):
        try:
            sentencepiece = import_module("sentencepiece")  # transformers makes tokenizer.json with it
        except ImportError as error:
            raise MissingExtraError(f"{found.source}: reading {', '.join(files)}", "export", error) from error
        remedy = "expected a sentencepiece model; copy or download the file again"
        for name in files:
            with guarded(found.source, f"cannot read {name}", remedy):
                sentencepiece.SentencePieceProcessor(model_proto=(found.folder / name).read_bytes())


def _check_read(found: Settings, config: Any) -> None:
    """Raise InputError for other models than encoders, and for settings of positions that transformers ignores.

    transformers 5 has one name for the settings of rotary positions, which 4 does not know: it takes its defaults.
    """
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise InputError(f"{found.source}: {CONFIG}: has no num_hidden_layers; expected the settings of one encoder")
    known = inspect.signature(type(config).__init__).parameters.keys()
    ignored = [key for key in found.config if key.startswith("rope") and key not in known]
    if ignored:
        raise found.refusal(
            CONFIG,
            ignored[0],
            found.config[ignored[0]],
            f"settings that transformers {version('transformers')} reads for a {config.model_type}, which are "
            f"{', '.join(name for name in known if 'rope' in name) or 'none for positions'}; write them so",
        )
