"""What importing the package does: little, and no telemetry."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SPY = """
import os, sys
class Spy:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            print("when imported:", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Spy())
import cascade_rt
print("afterwards:", os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("1", "1"), ("", "")])
def test_telemetry_of_onnx_runtime_is_off_unless_the_user_decided(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    done = subprocess.run([sys.executable, "-c", SPY], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"when imported: {after}", f"afterwards: {after}"]
    assert done.stderr == ""


@pytest.mark.parametrize(("before", "warns"), [(None, True), ("1", False), ("0", False)])
def test_an_earlier_import_of_onnx_runtime_is_told_once(before: str | None, warns: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    code = "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
    code += "import warnings; warnings.simplefilter('always')\ntry:\n import cascade_rt\nexcept AttributeError: pass\n"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("set ORT_DISABLE_TELEMETRY=1 in the environment") == int(warns)
