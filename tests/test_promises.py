"""Promises of SECURITY.md and docs/guide/privacy.md that rest on a setting of another library: it is passed, not left.

A default can change with the other library's next version, so each of these settings is in our code, where it can be
read, and this test fails where one is dropped. Behaviour is tested elsewhere, from outside (test_privacy.py).
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PASSED: dict[str, dict[str, object]] = {
    "training_arguments": {"report_to": "none"},  # else every tracker that is installed gets the run
    "from_pretrained": {"trust_remote_code": False},
    "from_config": {"trust_remote_code": False},
    "np.load": {"allow_pickle": False},
    "uvicorn.Config": {"log_config": None, "access_log": False, "server_header": False},
    "FastAPIOffline": {"redoc_url": None},
    "Environment": {"autoescape": True},  # texts are data of the build's page, not HTML
    "ray.init": {"log_to_driver": False},
}
"""Calls in our code -> settings that each of them has to pass."""

ONLY_IN = {
    "from_pretrained": {"export/cascade_train/sources.py"},  # which is given a folder, never a repository's name
    "hf_hub_download": {"cascade_rt/bundle/hub.py"},
    "snapshot_download": {"cascade_rt/bundle/hub.py", "export/cascade_train/sources.py"},
    "HfApi": {"cascade_rt/bundle/hub.py"},
    "OTLPSpanExporter": {"cascade_rt/serving/tracing.py"},
    "ray.init": {"cascade_rt/cluster.py"},
    "FastAPI": set[str](),  # its pages load scripts from other hosts; those of FastAPIOffline do not
    "register_custom_ops_library": set[str](),
    "torch.load": set[str](),
    "eval": set[str](),
    "exec": set[str](),
    "urlopen": set[str](),
}
"""Calls that reach out, or run what they are given -> the files that may make them."""


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Return each call in our code: its file, its name, and the call."""
    return [
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node)
        for folder in ("cascade_rt", "export")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]


def is_called(called: str, name: str) -> bool:
    """Return whether a call is one of `name`, written with its module or without."""
    return called == name or called.endswith(f".{name}")


@pytest.mark.parametrize("name", PASSED)
def test_a_setting_that_a_promise_rests_on_is_passed(name: str) -> None:
    found = [(file, call) for file, called, call in calls() if is_called(called, name)]
    assert found, f"nothing calls {name} any more"
    for file, call in found:
        given = {word.arg: word.value for word in call.keywords}
        for setting, value in PASSED[name].items():
            assert setting in given, f"{file}:{call.lineno}: {name} without {setting}={value!r}"
            assert ast.literal_eval(given[setting]) == value, f"{file}:{call.lineno}: {setting}"


@pytest.mark.parametrize("name", ONLY_IN)
def test_what_reaches_out_is_called_in_one_place(name: str) -> None:
    builtin = name in ("eval", "exec")  # `model.eval()` is another function
    files = {file for file, called, _ in calls() if (called == name if builtin else is_called(called, name))}
    assert files <= ONLY_IN[name]
