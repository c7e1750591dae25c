"""cascade-rt: text classification with a cascade of complete BERTs, small to big, on ONNX Runtime.

from cascade_rt import CascadeRuntime

runtime = CascadeRuntime("bundle/")
runtime.predict(["a text", "another"])
"""

import os
from importlib.metadata import version

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

from .bundle import Bundle, MemberEntry, read_bundle
from .errors import (
    BundleError,
    CascadeError,
    InferenceError,
    InputError,
    InvalidOption,
    MissingExtraError,
    TextError,
)
from .runtime import CascadeRuntime
from .types import Prediction, StageRun, Stats, Trace

__version__ = version("cascade-rt")

__all__ = [
    "Bundle",
    "BundleError",
    "CascadeError",
    "CascadeRuntime",
    "InferenceError",
    "InputError",
    "InvalidOption",
    "MemberEntry",
    "MissingExtraError",
    "Prediction",
    "StageRun",
    "Stats",
    "TextError",
    "Trace",
    "__version__",
    "read_bundle",
]
