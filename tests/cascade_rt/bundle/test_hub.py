"""Push and pull through the real hub client, against a small server of its protocol on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import BundleError, CascadeRuntime
from cascade_rt.bundle import read_bundle
from cascade_rt.bundle.card import model_card
from cascade_rt.cli import main

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Repositories in memory: as much of the hub's protocol as uploading and downloading a folder takes."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - one hub per test module

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self._send({"url": self._address()})
        elif self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._send(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._send({"success": True, "commitOid": _COMMIT, "commitUrl": f"{self._address()}/commit/{_COMMIT}"})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/team/commands/tree/"):
            self._send(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
            )
            return
        if self.path.startswith("/api/models/team/commands"):
            names = [{"rfilename": name} for name in self.files]
            self._send({"id": "team/commands", "sha": _COMMIT, "private": False, "siblings": names, "tags": []})
            return
        repository, _, rest = self.path.partition("/resolve/")
        name = rest.partition("/")[2] if repository == "/team/commands" else ""
        content = self.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def _address(self) -> str:
        return f"http://{self.headers['Host']}/team/commands"

    def _send(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that finds this hub in place of the real one."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_none",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        server.shutdown()


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cascade_rt", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def _run_all(environment: dict[str, str], commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other in one process, up to the first that fails."""
    code = f"from cascade_rt.cli import main\nraise SystemExit(next(filter(None, map(main, {commands!r})), 0))"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_bundle_goes_to_the_hub_and_comes_back(hub: dict[str, str], bundle: Path) -> None:
    pushed = _run(hub, "push", "--model-dir", str(bundle), "team/commands")
    assert pushed.returncode == 0, pushed.stderr
    assert _Hub.files.keys() == {path.name for path in bundle.iterdir()} | {"README.md"}
    assert _Hub.files["README.md"].decode() == model_card(read_bundle(bundle), "team/commands")
    texts = ["a great film", "so sad"]
    wanted = [answer.label for answer in CascadeRuntime(bundle).predict(texts)]
    names = ["hf:team/commands", "hf:team/commands@main", "hf:team/commands"]
    online = _run_all(hub, [["predict", "--model-dir", name, *texts] for name in names])
    assert online.returncode == 0, online.stderr
    lines = online.stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == 3 * wanted
    offline = _run_all(
        hub | {"HF_HUB_OFFLINE": "1"},
        [["predict", "--model-dir", "hf:team/commands", *texts], ["info", "--model-dir", "hf:team/nothing"]],
    )
    assert offline.stdout.splitlines() == lines[:2], "what was downloaded once needs no network"
    assert offline.returncode == 2
    missing = _run(hub, "info", "--model-dir", "hf:team/nothing")
    assert missing.returncode == 2
    assert "hf:team/nothing: downloading it from the Hugging Face hub failed" in missing.stderr
    bare = _run(hub, "info", "--model-dir", "team/commands")
    assert bare.returncode == 2
    assert "a bundle on the Hugging Face hub is named hf:team/commands" in bare.stderr


def test_offline_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model-dir", "hf:team/commands"]) == 2
    error = capsys.readouterr().err
    assert "downloading it from the Hugging Face hub failed" in error
    assert error.count("\n") == 1


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    with pytest.raises(BundleError, match="org/name: no bundle there .no such folder.; .* is named hf:org/name"):
        read_bundle("org/name")
    for name in ("bundles/nothing", "./nothing", "nothing", "a/b/c", tmp_path / "x" / "y"):
        with pytest.raises(BundleError, match=r"no bundle there \(no such folder\); .*(check the path|named hf:\w+)"):
            read_bundle(name)
