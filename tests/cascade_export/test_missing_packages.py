"""An offline command whose packages are not installed names the extra that has them, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

ARGUMENTS = {
    "train": ["--base", "x", "--task", "smart-home", "--output", "out"],
    "export": ["--member", "x", "--output", "out"],
}


@pytest.mark.parametrize("package", ["transformers", "torch", "sklearn"])
@pytest.mark.parametrize("stage", ["train", "export"])
def test_an_offline_stage_that_is_not_installed_names_its_extra(stage: str, package: str) -> None:
    if (stage, package) == ("export", "sklearn"):
        pytest.skip("not used there")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from cascade_rt.cli import main\n"
        f"sys.exit(main({[stage, *ARGUMENTS[stage]]}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-2000:]
    assert "pip install 'cascade-rt[export]'" in done.stderr
