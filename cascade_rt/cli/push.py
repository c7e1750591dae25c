"""Upload a bundle and its model card to the Hugging Face hub, in one commit. HF_TOKEN holds the access token."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bundle import bundle_files, read_bundle
from ..bundle.card import model_card
from ..bundle.hub import push
from .parser import CommandParser
from .rendering import printable

SUMMARY = "upload a bundle to the Hugging Face hub"
EXAMPLE = "cascade-rt push --model-dir bundle/ --dry-run ORG/NAME"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    parser.add_argument("--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder")
    parser.reads("model_dir")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument("--dry-run", action="store_true", help="print the model card and upload nothing")
    parser.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")


def run(options: argparse.Namespace) -> None:
    """Verify and upload."""
    bundle = read_bundle(options.model_dir)
    card = model_card(bundle, options.repository)
    if options.dry_run:
        print(printable(card))
        return
    folder = bundle.folder or Path(options.model_dir)
    print(push(folder, bundle_files(bundle), card, options.repository, private=options.private))
