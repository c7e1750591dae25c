"""A child process that was forked by a parent whose runtime has already run."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path


def check_a_fork(bundle: Path, texts: Sequence[str], provider: str) -> None:
    """Let a process answer, fork, and answer again in the child, in bulk and one text; fail if that differs.

    The child closes its runtime and ends as a program does, with all that Python does then.
    """
    program = (
        "import gc, os, sys, warnings\n"
        "warnings.simplefilter('ignore')  # of newer versions of Python, on a fork beside threads\n"
        "from cascade_rt import CascadeRuntime\n"
        f"runtime, other = [CascadeRuntime({str(bundle)!r}, provider={provider!r}, threads=2) for _ in range(2)]\n"
        f"texts = {texts!r}\n"
        "before = runtime.predict(texts)\n"
        "assert other.predict(texts[:1])\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "same = runtime.predict(texts) == before and runtime.predict(texts[:1])[0].label == before[0].label\n"
        "runtime.close()\n"
        "gc.collect()\n"
        "sys.exit(0 if same else 1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def forked(check: Callable[[], bool]) -> int:
    """Fork this process and return the child's id; its status is 0 if `check` is true there, within 20 seconds."""
    gc.collect()  # what other tests left, such as sessions of ONNX Runtime alone, is not destroyed in the child
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        faulthandler.register(signal.SIGALRM, chain=True)  # shows where it hangs
        signal.alarm(20)
        status = 0 if check() else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a forked child; return its status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
