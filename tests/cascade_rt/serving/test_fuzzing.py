"""Schemathesis against the description of the interfaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx


def test_every_answer_is_described_and_none_is_a_server_error(address: str, tmp_path: Path) -> None:
    """All checks but one: whether a valid text or pair is accepted depends on the bundle, not on the description."""
    version = httpx.get(f"http://{address}/v2/models/toy").json()["versions"][0]
    config = tmp_path / "schemathesis.toml"
    config.write_text(f'[parameters]\nname = "toy"\nversion = "{version}"\n')
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run"]
    options = ["--max-examples=30", "--generation-deterministic", "--phases=examples,coverage,fuzzing"]
    options += ["--exclude-checks=positive_data_acceptance", f"http://{address}/openapi.json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    operations = httpx.get(f"http://{address}/openapi.json").json()["paths"].values()
    assert f"Tested: {sum(map(len, operations))}\n" in done.stdout
