"""A bundle of fp32 members, turned into int8 in its place."""

from __future__ import annotations

from pathlib import Path

from cascade_export.precision import write_precision

from cascade_rt.bundle.files import sha256_of

from ..cascade_rt.bundle.manifests import Manifest, altered


def to_int8(bundle: Path) -> None:
    """Replace every member's file by one in int8."""

    def change(manifest: Manifest) -> None:
        for entry in manifest["members"]:
            file = bundle / entry["file"]
            write_precision(file, bundle / "int8.onnx", "int8")
            (bundle / "int8.onnx").replace(file)
            entry |= {"precision": "int8", "sha256": sha256_of(file)}

    altered(bundle, change)
