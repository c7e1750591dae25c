"""Hooks of the site: files outside `docs/` that pages link to, and the help of the commands.

The path `../../benchmarks/results/x.png` of a page works on GitHub but leads out of `docs/`: the site gets a copy.
"""

import os
from importlib.metadata import entry_points
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from cascade_rt.cli import BUILT_IN, GROUP, find_command
from cascade_rt.cli.parser import CommandParser

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("benchmarks/results", "deploy", "examples")
OF_THE_PROJECT = ("CHANGELOG", "CONTRIBUTING", "SECURITY")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the folders `COPIED`, found under `../FOLDER` from the pages, and the project's own pages."""
    for folder in COPIED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".md", ".pyc"):
                name = path.relative_to(ROOT).as_posix()
                file = File.generated(config, f"../{name}", abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
                file.dest_uri = name
                files.append(file)
    for name in OF_THE_PROJECT:
        text = (ROOT / f"{name}.md").read_text("utf-8").replace("(docs/", "(../")
        for other in OF_THE_PROJECT:
            text = text.replace(f"({other}.md)", f"({other.lower()}.md)")
        files.append(File.generated(config, f"project/{name.lower()}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the help of every command into the page of commands."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    os.environ["COLUMNS"] = "100"  # argparse wraps to it
    names = [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)})]
    helps = [f"## {name}\n\n```text\n{CommandParser(name, find_command(name)).format_help()}```" for name in names]
    text, _, _ = markdown.partition("<!--")
    return text + "\n\n".join(helps)
