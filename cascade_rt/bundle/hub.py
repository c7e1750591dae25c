"""Bundles on the Hugging Face hub, through `huggingface_hub`."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BundleError, CascadeError, InvalidOption, first_line

_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(model_dir: str | Path) -> tuple[Path, Path]:
    """Return a bundle's folder, and the folder that its files must stay inside.

    The two differ for bundles on the hub ("org/name" or "org/name@revision"): its cache keeps the files of all
    revisions of a repository side by side and links to them. A repository that was fetched before is found without a
    network. Raises BundleError if the bundle is neither a local folder nor on the hub.
    """
    folder = Path(model_dir)
    asked = _REPOSITORY.fullmatch(str(model_dir))
    if asked is None or isinstance(model_dir, Path) or folder.exists() or folder.parent.is_dir():
        return folder, folder
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only needed here

    try:
        manifest = huggingface_hub.hf_hub_download(asked["name"], "cascade.json", revision=asked["revision"])
        snapshot = Path(
            huggingface_hub.snapshot_download(
                asked["name"], revision=asked["revision"], allow_patterns=["cascade.json", *_named_in(Path(manifest))]
            )
        )
    except Exception as error:  # its own errors, those of the HTTP library and of the disk
        raise BundleError(
            f"{model_dir}: no such folder, and downloading it from the Hugging Face hub failed "
            f"({first_line(error)}); check the name, the network and, for a private one, HF_TOKEN"
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


def push(folder: Path, files: Iterable[str], card: str, repository: str, *, private: bool) -> str:
    """Upload a bundle's files and its model card in one commit; return the repository's address.

    Creates the repository if it does not exist. Raises CascadeError if the hub refuses.
    """
    import huggingface_hub  # noqa: PLC0415

    if not _REPOSITORY.fullmatch(repository) or "@" in repository:
        raise InvalidOption("repository", repository, "org/name")
    hub = huggingface_hub.HfApi()
    try:
        additions: list[Any] = [
            huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files
        ]
        additions.append(huggingface_hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
        address = str(hub.create_repo(repository, private=private, exist_ok=True))
        hub.create_commit(repository, additions, commit_message="Add a cascade-rt bundle")
    except Exception as error:
        raise CascadeError(
            f"{repository}: the hub did not accept it ({first_line(error)}); check the network and HF_TOKEN"
        ) from error
    return address
