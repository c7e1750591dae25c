"""Pretrained and fine-tuned models by name: local folders, and repositories of the Hugging Face hub as hf:NAME."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cascade_rt.bundle.hub import repository
from cascade_rt.errors import InputError


def pretrained(kind: Any, source: str, **settings: Any) -> Any:
    """Return `kind.from_pretrained` of a local folder, or of "hf:NAME" or "hf:NAME@REVISION" on the Hugging Face hub.

    `kind`: one of transformers' Auto classes. Without the prefix nothing is looked for on the hub, so a mistyped path
    never fetches a stranger's model. Raises InputError for a folder that does not exist.
    """
    asked = repository(source)
    if asked is None:
        if not Path(source).is_dir():
            raise InputError(f"no such folder; on the Hugging Face hub it would be hf:{source}")
        if kind is not AutoTokenizer and not (Path(source) / "config.json").is_file():
            raise InputError("the folder has no config.json")
        return kind.from_pretrained(source, **settings)
    name, revision = asked
    return kind.from_pretrained(name, revision=revision or "main", **settings)
