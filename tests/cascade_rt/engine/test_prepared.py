"""Members that are kept as prepared for this CPU: the same answers, from files that are checked and bounded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cascade_rt import BundleError, CascadeRuntime, Prediction
from cascade_rt.engine import prepared
from cascade_rt.engine.providers import installed_version
from cascade_rt.io.caches import cache_folder

pytestmark = pytest.mark.skipif(installed_version() < prepared._SINCE, reason="this ONNX Runtime cannot keep them")

TEXTS = ["a film", "a bad film that is long and dull", "good"] * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where members of any size are kept."""
    monkeypatch.setattr(prepared, "_SMALLEST", 0)
    return tmp_path / "cache"


def answers(bundle: Path, cache: Path | str, **settings: object) -> list[Prediction]:
    """Return the answers to TEXTS in bulk, and one by one, through all members."""
    with CascadeRuntime(bundle, thresholds=1.0, cache=cache, **settings) as runtime:  # type: ignore[arg-type]
        return [*runtime.predict(TEXTS), *(runtime.predict([text])[0] for text in TEXTS[:3])]


def kept(cache: Path) -> list[Path]:
    """Return the members in a cache."""
    return sorted(record.parent for record in cache.glob("*/record.json"))


def test_answers_are_the_same_to_the_bit(bundle: Path, cache: Path) -> None:
    expected = answers(bundle, "off")
    assert answers(bundle, cache) == expected
    assert len(kept(cache)) == len(list(cache.iterdir())) == 3
    assert answers(bundle, cache) == expected
    assert answers(bundle, cache, threads=2) == expected
    assert len(kept(cache)) == 3


def test_only_members_that_texts_need_are_kept(bundle: Path, cache: Path) -> None:
    CascadeRuntime(bundle, thresholds=0.0, cache=cache).predict(["a film"])
    assert len(kept(cache)) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "graph", "record", "gone"])
def test_a_damaged_one_is_made_again(bundle: Path, cache: Path, damage: str) -> None:
    expected = answers(bundle, cache)
    sizes = {folder: (folder / "member.onnx_data").stat().st_size for folder in kept(cache)}
    for folder in kept(cache):
        weights = folder / "member.onnx_data"
        content = bytearray(weights.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 64
            weights.write_bytes(content)
        elif damage == "cut":
            weights.write_bytes(content[:-100])
        elif damage == "graph":
            (folder / "member.onnx").write_bytes(b"not a graph")
        elif damage == "record":
            (folder / "record.json").write_text("{")
        else:
            weights.unlink()
    assert answers(bundle, cache) == expected
    assert len(kept(cache)) == 3
    assert all((folder / "member.onnx_data").stat().st_size == size for folder, size in sizes.items())


def test_a_copied_cache_is_verified_and_used(bundle: Path, cache: Path, tmp_path: Path) -> None:
    expected = answers(bundle, cache)
    copy = shutil.copytree(cache, tmp_path / "copy")
    made = {folder: (folder / "member.onnx").stat().st_ino for folder in kept(copy)}
    assert answers(bundle, copy) == expected
    assert {folder: (folder / "member.onnx").stat().st_ino for folder in kept(copy)} == made


def test_another_cpu_has_its_own(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(bundle, cache)
    monkeypatch.setattr(prepared, "machine", lambda: ("another",))
    assert answers(bundle, cache) == expected
    assert len(kept(cache)) == 6


def test_those_not_used_for_longest_go_first(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CascadeRuntime(bundle, thresholds=0.0, cache=cache).predict(["a film"])
    (first,) = kept(cache)
    os.utime(first / "record.json", (0, 0))
    monkeypatch.setattr(prepared, "LARGEST", sum(file.stat().st_size for file in first.iterdir()))
    answers(bundle, cache)
    assert len(kept(cache)) == 1
    assert first not in kept(cache)


def test_nothing_is_kept_without_verification_or_where_it_is_off(
    bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(bundle, cache, verify=False)
    assert not cache.exists()
    monkeypatch.setenv(prepared.FOLDER, str(cache))
    assert answers(bundle, "off") == expected
    assert not cache.exists()
    CascadeRuntime(bundle, thresholds=1.0).predict(TEXTS)
    assert len(kept(cache)) == 3


def test_a_folder_that_cannot_be_written_is_no_error(bundle: Path, cache: Path) -> None:
    cache.write_text("a file")
    assert answers(bundle, cache) == answers(bundle, "off")


def test_it_is_not_written_where_memory_is_short(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "available_memory", lambda: 1000)
    assert answers(bundle, cache) == answers(bundle, "off")
    assert not cache.exists()


def test_a_member_is_verified_where_its_prepared_file_cannot_be_loaded(
    copied: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CascadeRuntime(copied, thresholds=0.0, cache=cache).predict(["a film"])
    (folder,) = kept(cache)
    monkeypatch.setattr(prepared.Prepared, "ready", lambda _: True)
    (folder / "member.onnx").unlink()
    content = bytearray((copied / "tiny.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "tiny.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="truncated or altered"):
        CascadeRuntime(copied, thresholds=0.0, cache=cache).predict(["a film"])


def test_small_members_are_not_kept(bundle: Path, tmp_path: Path) -> None:
    answers(bundle, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_user_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(prepared.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepared.members_folder(None) == tmp_path / "cascade-rt" / "members"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    assert prepared.members_folder(None) is None
