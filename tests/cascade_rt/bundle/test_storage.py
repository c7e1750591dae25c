"""Bundles on disk: what is damaged is refused, what is killed leaves nothing, what is replaced is never mixed."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

import pytest

from cascade_rt import BundleError, CascadeRuntime, InputError, read_bundle
from cascade_rt.bundle import sha256_of, write_bundle
from cascade_rt.bundle import storage as module
from cascade_rt.cli import main

from .manifests import Manifest, altered, set_to


def test_files_missing_truncated_or_altered_are_refused(bundle: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tiny.onnx", "big.onnx"):
        for index, damage in enumerate((_remove, _truncate, _flip)):
            folder = shutil.copytree(bundle, tmp_path / f"{name}-{index}")
            damage(folder / name)
            with pytest.raises(BundleError, match=rf"{name}: (is missing|truncated or altered)"):
                read_bundle(folder)


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_link_out_of_the_folder_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "tiny.onnx").rename(tmp_path / "elsewhere.onnx")
    (copied / "tiny.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="leads out of the bundle's folder"):
        read_bundle(copied)


def test_a_link_to_itself_is_refused(copied: Path) -> None:
    (copied / "tiny.onnx").unlink()
    (copied / "tiny.onnx").symlink_to("tiny.onnx")
    with pytest.raises(BundleError, match=r"tiny\.onnx"):
        read_bundle(copied)


def test_some_members_alone(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, members=["big", "tiny"])
    assert [member.name for member in runtime.bundle.members] == ["tiny", "big"]
    assert [member.threshold for member in runtime.bundle.members] == [0.8, None]
    alone = CascadeRuntime(bundle, members=["small"])
    assert {(answer.exit, answer.layers) for answer in alone.predict(["a film", "so sad"])} == {(0, 2)}
    for names in (["huge"], []):
        with pytest.raises(InputError, match="expected some of: tiny, small, big"):
            CascadeRuntime(bundle, members=names)


def test_a_bundle_behind_a_link_is_read(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    assert read_bundle(tmp_path / "current") == read_bundle(bundle)


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: no bundle there"):
        read_bundle(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_with_overwrite(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="or overwrite that bundle"), write_bundle(copied):
        pass
    with pytest.raises(ZeroDivisionError), write_bundle(copied, overwrite=True):
        _ = 1 / 0
    read_bundle(copied)  # still whole
    with pytest.raises(BundleError, match="not valid JSON"), write_bundle(copied, overwrite=True) as folder:
        (folder / "cascade.json").write_text("a bundle that cannot be read is not written")
    read_bundle(copied)
    with write_bundle(copied, overwrite=True) as folder:
        shutil.copytree(copied, folder, dirs_exist_ok=True)
        altered(folder, set_to("note", to="new"))
    assert read_bundle(copied).other == {"note": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"), write_bundle(tmp_path / "thesis", overwrite=True):
        pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_replacement_is_one_step(copied: Path) -> None:
    """Whoever reads meanwhile finds the old bundle or the new one, never none."""
    if sys.platform != "linux":
        pytest.skip("there is no exchange of names")
    done = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not done.is_set():
            seen.append(1 if (copied / "cascade.json").is_file() else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            with write_bundle(copied, overwrite=True) as folder:
                shutil.copytree(copied, folder, dirs_exist_ok=True)
    finally:
        done.set()
        watcher.join()
    assert len(seen) > 20
    assert all(seen)
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_system_without_an_exchange_of_names_replaces_in_two_steps(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    with write_bundle(copied, overwrite=True) as folder:
        shutil.copytree(copied, folder, dirs_exist_ok=True)
        altered(folder, set_to("note", to="new"))
    assert read_bundle(copied).other == {"note": "new"}
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_runtime_never_mixes_two_bundles(copied: Path) -> None:
    """Members are loaded when first needed; if the bundle was replaced meanwhile, that is an error."""
    lazy, loaded = CascadeRuntime(copied), CascadeRuntime(copied, preload=True)
    before = loaded.predict(["a film"])
    with write_bundle(copied, overwrite=True) as folder:
        shutil.copytree(copied, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    assert loaded.predict(["a film"]) == before
    with pytest.raises(BundleError, match="replaced since the bundle was opened; open it again"):
        lazy.predict(["a film"])


def test_a_tokenizer_that_fails_on_a_text_says_so(copied: Path) -> None:
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    del tokenizer["model"]["vocab"]["[UNK]"]
    path.write_text(json.dumps(tokenizer), "utf-8")

    def change(manifest: Manifest) -> None:
        manifest["tokenizer"]["sha256"] = sha256_of(path)

    with pytest.raises(BundleError, match="tokenizer cannot"):
        CascadeRuntime(altered(copied, change)).predict(["\u4e00"])


def test_a_member_is_verified_when_it_is_first_loaded(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = (copied / "big.onnx").read_bytes()
    (copied / "big.onnx").write_bytes(original + b"\x00\x00")
    runtime = CascadeRuntime(copied, thresholds=[0.0, 0.0])
    assert runtime.predict(["a film"])[0].exit == 0
    for _ in range(2):
        with pytest.raises(BundleError, match=r"big\.onnx: truncated or altered"):
            runtime.with_thresholds(1.0).predict(["a film"])
    with pytest.raises(BundleError, match="altered"):
        CascadeRuntime(copied, preload=True)
    with pytest.raises(BundleError, match="altered"):
        read_bundle(copied)
    assert main(["info", "--model-dir", str(copied)]) == 2
    assert "altered" in capsys.readouterr().err


def test_unverified_files_are_not_hashed_but_must_be_there(copied: Path) -> None:
    content = bytearray((copied / "big.onnx").read_bytes())
    content[len(content) // 2] ^= 1  # in the weights
    (copied / "big.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="altered"):
        read_bundle(copied)
    read_bundle(copied, verify=False)
    (copied / "tiny.onnx").unlink()
    with pytest.raises(BundleError, match=r"tiny\.onnx: is missing"):
        CascadeRuntime(copied, verify=False)


def test_another_bundle_than_the_expected_one_is_refused(
    bundle: Path, pair_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read_bundle(bundle).sha256
    assert expected is not None
    assert CascadeRuntime(bundle, expected_sha256=expected.upper()).predict(["a film"])
    with pytest.raises(BundleError, match=f"another bundle than expected .found sha256 .*, expected {expected}"):
        CascadeRuntime(pair_bundle, expected_sha256=expected)
    assert main(["info", "--model-dir", str(bundle)]) == 0
    assert f"sha256 {expected}" in capsys.readouterr().out
    for command in (["info"], ["predict", "a", "b"]):
        arguments = [command[0], "--model-dir", str(pair_bundle), "--expect-sha256", expected, *command[1:]]
        assert main(arguments) == 2
        assert "another bundle than expected" in capsys.readouterr().err


def test_of_two_exports_to_one_folder_the_second_is_told(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    refused = pytest.raises(BundleError, match="out was written by another process in the meantime and is kept")
    with refused, write_bundle(target) as slow:
        shutil.copytree(bundle, slow, dirs_exist_ok=True)
        shutil.copytree(bundle, target)
    assert read_bundle(target).labels == read_bundle(bundle).labels
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
