"""No telemetry: no connection, and no file but those that were asked for. Watched from outside, by strace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_LIBRARY = """
from cascade_rt import CascadeRuntime
print(CascadeRuntime({bundle!r}).predict(["a good film", "so sad"])[0].label)
"""
_WORKERS = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from cascade_rt import CascadeRuntime
if __name__ == "__main__":
    runtime = CascadeRuntime({bundle!r})
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        print(list(pool.map(runtime.predict, [["a good film"], ["so sad"]]))[0][0].label)
"""
_WRITES = re.compile(r'(?:openat|open|creat|mkdir|mkdirat|rename|renameat2?)\((?:AT_FDCWD, )?"([^"]*)"(.*)')


def watched(command: Sequence[str], home: Path) -> tuple[list[str], set[str]]:
    """Run a command with an empty home folder, and an empty temporary one beside it.

    Returns its connections, and the files that it wrote outside of /dev.
    """
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    temporary = home.with_name("temporary")
    home.mkdir()
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    folders = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(temporary)}
    environment = kept | folders | {"PYTHONDONTWRITEBYTECODE": "1"}
    log = home.with_suffix(".strace")
    calls = "trace=connect,sendto,sendmsg,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2"
    tracing = ["strace", "-f", "-qq", "-e", calls, "-o", str(log)]
    done = subprocess.run([*tracing, *command], env=environment, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and not log.read_text():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log.read_text().splitlines()
    connections = [line for line in lines if re.search(r"\b(connect|sendto|sendmsg)\(", line)]
    written = set()
    for line in lines:
        found = _WRITES.search(line)
        opens = found and "open" in line.split("(")[0]
        if found and " = -1 " not in line and (not opens or re.search("O_WRONLY|O_RDWR|O_CREAT", found[2])):
            written.add(found[1])
    return connections, {path for path in written if not path.startswith(("/dev/", "/proc/"))}


@pytest.mark.parametrize("code", [_LIBRARY, _WORKERS], ids=["library", "workers"])
def test_the_runtime_connects_to_nothing_and_writes_nothing(code: str, bundle: Path, tmp_path: Path) -> None:
    Path("main.py").write_text(code.format(bundle=str(bundle)))
    connections, written = watched([sys.executable, "main.py"], tmp_path / "home")
    assert connections == []
    assert written == set()
    assert list((tmp_path / "home").iterdir()) == []


def test_the_command_writes_its_output_alone(bundle: Path, tmp_path: Path) -> None:
    Path("texts.txt").write_text("a good film\nso sad\n")
    command = [sys.executable, "-m", "cascade_rt", "predict", "--model-dir", str(bundle)]
    connections, written = watched([*command, "--input", "texts.txt", "--output", "out.jsonl"], tmp_path / "home")
    assert connections == []
    assert {Path(path).parent for path in written} == {tmp_path}
    assert all("out.jsonl" in path for path in written)
    assert list((tmp_path / "home").iterdir()) == []


def test_the_watch_sees_a_connection_and_a_file(tmp_path: Path) -> None:
    code = (
        "import socket, pathlib; socket.socket().connect_ex(('127.0.0.1', 9)); pathlib.Path('seen.txt').write_text('')"
    )
    connections, written = watched([sys.executable, "-c", code], tmp_path / "home")
    assert len(connections) == 1
    assert written == {"seen.txt"}
