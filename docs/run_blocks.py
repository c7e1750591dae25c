"""Run the commands of the documentation: every fenced `bash` block of some Markdown files, in a copy of the checkout.

    python docs/run_blocks.py README.md docs/guide/predict.md

The blocks of one file run in one bash session, so variables persist from block to block; files left by one file are
there for the next. A block directly after a line `<!-- recipe: REASON -->` is not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
LINKED = (".venv", "runs")  # too big to copy; git ignores them
_RECIPE = re.compile(r"\s*<!-- recipe: (?P<reason>.*\S) -->\s*")
_FENCE = re.compile(r"(?P<indent> *)(?P<marks>`{3,})(?P<language>[\w-]*)")


@dataclass(frozen=True)
class Block:
    """One fenced `bash` block."""

    where: str
    """File and line of its first command."""
    commands: str
    recipe: str | None
    """Why it is not run; None for a block that is."""

    @property
    def title(self) -> str:
        """The place and the first line of the commands."""
        return f"{self.where}: {self.commands.strip().partition(chr(10))[0]}"


def read_blocks(file: Path) -> Iterator[Block]:
    """Yield the `bash` blocks of a Markdown file."""
    lines = file.read_text("utf-8").splitlines()
    start = 0
    while start < len(lines):
        fence = _FENCE.match(lines[start])
        if fence is None:
            start += 1
            continue
        end = start + 1
        while end < len(lines) and lines[end].strip() != fence["marks"]:
            end += 1
        if end == len(lines):
            sys.exit(f"{file}:{start + 1}: the code block has no end")
        if fence["language"] == "bash":
            recipe = _RECIPE.fullmatch(lines[start - 1]) if start else None
            commands = "\n".join(line.removeprefix(fence["indent"]) for line in lines[start + 1 : end])
            yield Block(f"{file}:{start + 2}", commands, recipe["reason"] if recipe else None)
        start = end + 1


def session(blocks: list[Block]) -> str:
    """Return one bash script for the blocks of a file; it names the block that fails."""
    lines = ["set -euo pipefail", """trap 's=$?; [ $s = 0 ] || echo "$BLOCK: exit status $s" >&2' EXIT"""]
    for block in blocks:
        lines += [f"BLOCK={shlex.quote(block.where)}", f"echo {shlex.quote('== ' + block.title)}", block.commands]
    return "\n".join(lines) + "\n"


def copy_checkout(target: Path) -> None:
    """Copy the files that git tracks or would track, and link the folders of `LINKED`."""
    git = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():  # a tracked file may have been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (target / name).symlink_to(ROOT / name)


def run(sessions: list[str]) -> bool:
    """Run the scripts one after the other in one copy of the checkout; return whether all succeeded."""
    with TemporaryDirectory(prefix="cascade-docs-") as folder:
        copy_checkout(Path(folder))
        path = os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)])
        environment = os.environ | {"PATH": path, "XDG_CACHE_HOME": str(Path(folder) / ".cache")}
        file = Path(folder) / ".session.sh"
        for text in sessions:
            file.write_text(text, "utf-8")
            if subprocess.call(["bash", str(file)], cwd=folder, env=environment, stdin=subprocess.DEVNULL):
                return False
    return True


def main() -> int:
    """Run the blocks of the files that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="show the blocks and run nothing")
    options = parser.parse_args()
    found = [list(read_blocks(file)) for file in options.files]
    wanted = [blocks for some in found if (blocks := [block for block in some if block.recipe is None])]
    if options.list:
        for block in (block for some in found for block in some):
            print(block.title + (f"  [recipe: {block.recipe}]" if block.recipe else ""))
    elif not run([session(blocks) for blocks in wanted]):
        return 1
    count, recipes = sum(map(len, wanted)), sum(map(len, found)) - sum(map(len, wanted))
    print(f"{count} blocks of {len(wanted)} files {'to run' if options.list else 'run'}, {recipes} recipes not run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
