"""cascade-rt: text classification with a cascade of complete BERTs, small to big, on ONNX Runtime.

from cascade_rt import CascadeRuntime

runtime = CascadeRuntime("bundle/")
runtime.predict(["a text", "another"])
"""

import os
import sys
import warnings

if "ORT_DISABLE_TELEMETRY" not in os.environ and "onnxruntime" in sys.modules:
    warnings.warn(
        "onnxruntime was imported before cascade_rt, so its telemetry (since 1.32, on Linux) may be on; import "
        "cascade_rt first, or set ORT_DISABLE_TELEMETRY=1 in the environment",
        stacklevel=2,
    )

# What other libraries send unasked is turned off before they are imported; what the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else requests to the hub describe the machine

from .bundle import Bundle, MemberEntry, read_bundle
from .engine.exit_rules import Entropy, ExitRule, MaximumProbability, Patience
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

__version__: str

__all__ = [
    "Bundle",
    "BundleError",
    "CascadeError",
    "CascadeRuntime",
    "Entropy",
    "ExitRule",
    "InferenceError",
    "InputError",
    "InvalidOption",
    "MaximumProbability",
    "MemberEntry",
    "MissingExtraError",
    "Patience",
    "Prediction",
    "StageRun",
    "Stats",
    "TextError",
    "Trace",
    "__version__",
    "read_bundle",
]


def __getattr__(name: str) -> str:
    """Return the version when it is asked for: finding it takes a fifth of the import's time."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("cascade-rt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
