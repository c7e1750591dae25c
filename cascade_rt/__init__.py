"""cascade-rt: text classification with a cascade of complete BERTs, small to big, on ONNX Runtime.

from cascade_rt import CascadeRuntime
rt = CascadeRuntime("bundle/")
rt.predict(["a text", "another"])
"""

from importlib.metadata import version

from .bundle import Bundle, MemberEntry, read_bundle
from .drift import Stats
from .errors import BundleError, CascadeError, InputError, MissingExtraError
from .runtime import CascadeRuntime, Prediction

__version__ = version("cascade-rt")

__all__ = [
    "Bundle",
    "BundleError",
    "CascadeError",
    "CascadeRuntime",
    "InputError",
    "MemberEntry",
    "MissingExtraError",
    "Prediction",
    "Stats",
    "__version__",
    "read_bundle",
]
