"""Bundles on the Hugging Face hub, through `huggingface_hub`."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError, CascadeError, InvalidOption, first_line

_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
_ASKED = re.compile(rf"hf:(?P<name>{_NAME.pattern})(?:@(?P<revision>[\w./-]+))?")


def repository(source: str | Path) -> tuple[str, str | None] | None:
    """Return name and revision of "hf:NAME" or "hf:NAME@REVISION", a repository of the hub; None for anything else."""
    asked = _ASKED.fullmatch(source) if isinstance(source, str) else None
    return None if asked is None else (asked["name"], asked["revision"])


def locate(model_dir: str | Path) -> tuple[Path, Path]:
    """Return a bundle's folder, and the folder that its files must stay inside.

    The two differ for bundles on the hub ("hf:org/name" or "hf:org/name@revision"): its cache keeps the files of all
    revisions of a repository side by side and links to them. A repository that was fetched before is found without a
    network. Without the prefix nothing is looked for on the hub, so a mistyped path never fetches a stranger's bundle.
    Raises BundleError if there is no such folder or repository.
    """
    asked = repository(model_dir)
    if asked is None:
        folder = Path(model_dir)
        if not folder.exists():
            hint = "check the path"
            if _NAME.fullmatch(str(model_dir).partition("@")[0]):
                hint = (
                    f"a bundle on the Hugging Face hub is named hf:{model_dir}, since names without hf: are no longer "
                    "looked for there"
                )
            raise BundleError(f"{model_dir}: no bundle there (no such folder); {hint}")
        return folder, folder
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only needed here

    name, revision = asked
    try:
        manifest = huggingface_hub.hf_hub_download(name, "cascade.json", revision=revision)
        snapshot = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=["cascade.json", *_named_in(Path(manifest))]
            )
        )
    except Exception as error:  # its own errors, those of the HTTP library and of the disk
        raise BundleError(
            f"{model_dir}: downloading it from the Hugging Face hub failed ({first_line(error)}); check the name, the "
            "network and, for a private one, HF_TOKEN"
        ) from error
    return snapshot, snapshot.parent.parent


def _named_in(manifest: Path) -> Iterator[str]:
    """Yield every file that a manifest names, so that no others are fetched; it is checked later."""
    waiting = [json.loads(manifest.read_text("utf-8"))]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and isinstance(value.get("file"), str):
            yield glob.escape(value["file"])
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def push(folder: Path, files: Iterable[str], card: str, name: str, *, private: bool) -> str:
    """Upload a bundle's files and its model card in one commit; return the repository's address.

    Creates the repository if it does not exist. Raises CascadeError if the hub refuses.
    """
    import huggingface_hub  # noqa: PLC0415

    if not _NAME.fullmatch(name) or "/" not in name:
        raise InvalidOption("repository", name, "org/name")
    hub = huggingface_hub.HfApi()
    try:
        additions: list[Any] = [
            huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files
        ]
        additions.append(huggingface_hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
        address = str(hub.create_repo(name, private=private, exist_ok=True))
        hub.create_commit(name, additions, commit_message="Add a cascade-rt bundle")
    except Exception as error:
        raise CascadeError(
            f"{name}: the hub did not accept it ({first_line(error)}); check the network and HF_TOKEN"
        ) from error
    return address
