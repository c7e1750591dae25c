"""The on-disk format of a cascade: `cascade.json`, `tokenizer.json` and one ONNX file per member.

`manifest` is the schema, with the `precisions` that members may have, `storage` reads and writes whole bundles,
`paths`, `files` and `onnx_file` check what they name, `hub` and `card` share them.
"""

from .files import sha256_of
from .manifest import BATCH_TOLERANCE, MANIFEST, TUNING, Bundle, MemberEntry, WeightFile
from .storage import bundle_files, check_target, read_bundle, verify_member, write_bundle, write_manifest

__all__ = [
    "BATCH_TOLERANCE",
    "MANIFEST",
    "TUNING",
    "Bundle",
    "MemberEntry",
    "WeightFile",
    "bundle_files",
    "check_target",
    "read_bundle",
    "sha256_of",
    "verify_member",
    "write_bundle",
    "write_manifest",
]
