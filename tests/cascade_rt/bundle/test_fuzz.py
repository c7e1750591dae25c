"""Over 1,000 seeded alterations of a bundle: each is refused in one clear line, or gives exactly the right answers."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeError, CascadeRuntime
from cascade_rt.bundle import read_bundle, write_bundle, write_manifest
from cascade_rt.cli import main

_TEXTS = ["a great film", "so sad", "the cat sat on the mat and that was not very witty", ""]
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, -(10**40), 1e308, 0.5, "", "x", "../x", "/", "\0", "é" * 999,
    [], {}, [[]], [{}], {"a": None}, ["a", "b"], "cascade.json", "0" * 64, "\ud800", -1e-9,
)  # fmt: skip

Alteration = Callable[[random.Random, Path], object]


def _flip_a_bit(draw: random.Random, folder: Path) -> None:
    path = _a_file(draw, folder)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _flip_a_bit_of_the_manifest(draw: random.Random, folder: Path) -> None:
    path = folder / "cascade.json"
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(draw: random.Random, folder: Path) -> None:
    path = _a_file(draw, folder)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _overwrite_a_run(draw: random.Random, folder: Path) -> None:
    path = _a_file(draw, folder)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    run = draw.randbytes(draw.randint(1, 64))
    content[start : start + len(run)] = run
    path.write_bytes(content)


def _swap_files(draw: random.Random, folder: Path) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _remove_or_link_away(draw: random.Random, folder: Path) -> None:
    path = _a_file(draw, folder)
    path.unlink()
    if draw.random() < 0.7:
        path.symlink_to(draw.choice(["/etc/passwd", path.name, "..", str(folder.parent / "elsewhere")]))


def _change_a_value(draw: random.Random, folder: Path) -> None:
    """Leave the seal as it is."""
    path = folder / "cascade.json"
    manifest = json.loads(path.read_text("utf-8"))
    _set_somewhere(draw, manifest)
    path.write_text(json.dumps(manifest), "utf-8")


_ALTERATIONS: tuple[tuple[Alteration, int], ...] = (
    (_flip_a_bit, 300),
    (_flip_a_bit_of_the_manifest, 350),
    (_truncate, 120),
    (_overwrite_a_run, 120),
    (_swap_files, 30),
    (_remove_or_link_away, 40),
    (_change_a_value, 250),
)


def _a_file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def _set_somewhere(draw: random.Random, manifest: dict[str, Any]) -> None:
    places = list(_places(manifest))
    container, key = draw.choice(places)
    if draw.random() < 0.15:
        del container[key]
    else:
        container[key] = copy.deepcopy(draw.choice(_ODD))  # or the next change would alter the odd values


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


@pytest.fixture(scope="module")
def small(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with its two smaller members, whose files are quickly copied, and a seal."""
    return _sealed(bundle, ["tiny", "small"], tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture(scope="module")
def segments(two_segments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments, of format version 2, with a seal."""
    return _sealed(two_segments, ["segment-1", "segment-2"], tmp_path_factory.mktemp("fuzz") / "segments")


def _sealed(source: Path, members: list[str], target: Path) -> Path:
    kept = read_bundle(source, members)
    with write_bundle(target) as folder:
        for name in ("tokenizer.json", *(member.file for member in kept.members)):
            shutil.copy(source / name, folder)
        write_manifest(folder, kept)
    return target


def _altered(small: Path, tmp_path: Path, alteration: Alteration, seed: str) -> Path:
    folder = shutil.copytree(small, tmp_path / "altered")
    alteration(random.Random(seed), folder)
    return folder


def _answers(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(answer) for answer in CascadeRuntime(folder, threads=1).predict(_TEXTS)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("alteration", "times"), _ALTERATIONS)
def test_an_altered_bundle_is_refused_or_its_answers_are_unchanged(
    small: Path, segments: Path, tmp_path: Path, alteration: Alteration, times: int, version: int
) -> None:
    bundle = small if version == 1 else segments
    right = _answers(bundle)
    refused = 0
    for number in range(times):
        folder = _altered(bundle, tmp_path, alteration, f"{alteration.__name__} {number}")
        try:
            assert _answers(folder) == right, f"alteration {number} changed an answer"
        except CascadeError as error:  # anything else fails the test
            refused += 1
            assert "\n" not in str(error).strip()
        shutil.rmtree(folder)
    assert refused > times / 3


@pytest.mark.parametrize("version", [1, 2])
def test_an_invalid_manifest_without_a_seal_never_crashes(
    small: Path, segments: Path, tmp_path: Path, version: int
) -> None:
    """Other writers need not seal theirs; values of wrong types and sizes are then still refused, or harmless."""

    def unsealed(draw: random.Random, folder: Path) -> None:
        path = folder / "cascade.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest.pop("sha256", None)
        for _ in range(draw.randint(1, 3)):
            _set_somewhere(draw, manifest)
        path.write_text(json.dumps(manifest), "utf-8")

    refused = 0
    for number in range(250):
        folder = _altered(small if version == 1 else segments, tmp_path, unsealed, f"unsealed {number}")
        try:
            _answers(folder)
        except CascadeError:
            refused += 1
        for command in (["info"], ["push", "--dry-run", "a/b"]):  # 2 for a bundle that is refused; never a traceback
            assert main([command[0], "--model-dir", str(folder), *command[1:]]) in {0, 2}
        shutil.rmtree(folder)
    assert refused > 100
