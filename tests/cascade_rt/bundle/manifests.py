"""Changes to a manifest, as a hand or another program makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]


def altered(folder: Path, change: Callable[[Manifest], object]) -> Path:
    path = folder / "cascade.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    manifest.pop("sha256", None)  # as a manifest that another program wrote, which knows of no seal
    path.write_text(json.dumps(manifest), "utf-8")
    return folder


def set_to(*path: Any, to: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return change


def delete(*path: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change
