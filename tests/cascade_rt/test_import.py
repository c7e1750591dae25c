"""Importing the package does little, and starts no telemetry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
SPY = f"""
import os, sys
def show(when):
    print(when, *(os.environ.get(name) for name in {VARIABLES}))
class Spy:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            show("when imported:")
sys.meta_path.insert(0, Spy())
import cascade_rt
show("afterwards:")
from huggingface_hub import constants
print("to the hub:", constants.HF_HUB_DISABLE_TELEMETRY)
"""


@pytest.mark.parametrize(
    ("before", "after", "off"), [(None, "1 1", True), ("0", "0 0", False), ("1", "1 1", True), ("", " ", False)]
)
def test_what_other_libraries_send_is_off_unless_the_user_decided(before: str | None, after: str, off: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if before is not None:
        environment |= dict.fromkeys(VARIABLES, before)
    done = subprocess.run([sys.executable, "-c", SPY], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"when imported: {after}", f"afterwards: {after}", f"to the hub: {off}"]
    assert done.stderr == ""


def test_the_page_on_privacy_names_every_variable() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "privacy.md").read_text("utf-8")
    assert [name for name in (*VARIABLES, "RAY_USAGE_STATS_ENABLED") if f"`{name}" not in page] == []


@pytest.mark.parametrize(("before", "warns"), [(None, True), ("1", False), ("0", False)])
def test_an_earlier_import_of_onnx_runtime_is_told_once(before: str | None, warns: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    code = "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
    code += "import warnings; warnings.simplefilter('always')\ntry:\n import cascade_rt\nexcept AttributeError: pass\n"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("set ORT_DISABLE_TELEMETRY=1 in the environment") == int(warns)
