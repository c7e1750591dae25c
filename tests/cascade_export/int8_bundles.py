"""A bundle of fp32 members, turned into int8 in its place."""

from __future__ import annotations

from pathlib import Path

from cascade_export.precision import write_precision

from cascade_rt.bundle.files import sha256_of
from cascade_rt.bundle.precisions import PRECISIONS

from ..cascade_rt.bundle.manifests import Manifest, altered


def to_int8(bundle: Path, precision: str = "int8") -> None:
    """Replace every member's file by one in int8, or int8-vnni."""

    def change(manifest: Manifest) -> None:
        for entry in manifest["members"]:
            file = bundle / entry["file"]
            write_precision(file, bundle / "int8.onnx", precision)
            (bundle / "int8.onnx").replace(file)
            for data in entry.pop("data", []):
                (bundle / data["file"]).unlink()
            bits = PRECISIONS[precision].weight_bits
            entry |= {"precision": precision, "sha256": sha256_of(file), "weight_bits": bits}

    altered(bundle, change)
