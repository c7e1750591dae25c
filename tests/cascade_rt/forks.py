"""What a child process answers after a fork, when its parent's runtime has already run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def check_a_fork(bundle: Path, texts: Sequence[str], provider: str) -> None:
    """Let a process answer, fork, and answer again in the child, in bulk and one text; fail if that differs."""
    program = (
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore')  # of newer versions of Python, on a fork beside threads\n"
        "from cascade_rt import CascadeRuntime\n"
        f"runtime = CascadeRuntime({str(bundle)!r}, provider={provider!r}, threads=2)\n"
        f"texts = {texts!r}\n"
        "before = runtime.predict(texts)\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "same = runtime.predict(texts) == before and runtime.predict(texts[:1])[0].label == before[0].label\n"
        "os._exit(0 if same else 1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
