"""The on-disk contract: what is written is read, what is damaged is refused, what is killed leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import BundleError, CascadeRuntime, InputError, read_bundle
from cascade_rt.bundle import sha256_of, write_bundle, write_manifest

Manifest = dict[str, Any]


def altered(folder: Path, change: Callable[[Manifest], object]) -> Path:
    path = folder / "cascade.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    manifest.pop("sha256", None)  # as a manifest that another program wrote, which knows of no seal
    path.write_text(json.dumps(manifest), "utf-8")
    return folder


def test_the_manifest_has_the_keys_of_the_contract(bundle: Path) -> None:
    manifest = json.loads((bundle / "cascade.json").read_text("utf-8"))
    assert manifest["format_version"] == 1
    assert {"labels", "pair", "max_length", "tokenizer", "members", "provenance"} <= manifest.keys()
    assert manifest["tokenizer"].keys() == {"file", "sha256"}
    keys = {"name", "file", "sha256", "layers", "hidden_size", "parameters", "precision", "threshold"}
    assert all(keys <= member.keys() for member in manifest["members"])
    assert [member["layers"] for member in manifest["members"]] == [1, 2, 4]
    assert [member["threshold"] for member in manifest["members"]] == [0.8, 0.8, None]
    assert sorted(path.name for path in bundle.iterdir()) == sorted(
        ["cascade.json", "tokenizer.json", *(member["file"] for member in manifest["members"])]
    )


def test_unknown_keys_are_kept(copied: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["tuned"] = {"accuracy": 0.9}
        manifest["members"][0]["colour"] = "blue"

    bundle = read_bundle(altered(copied, change))
    write_manifest(copied, bundle)
    manifest = json.loads((copied / "cascade.json").read_text("utf-8"))
    assert manifest["tuned"] == {"accuracy": 0.9}
    assert manifest["members"][0]["colour"] == "blue"
    assert read_bundle(copied) == bundle


def _set(*path: Any, to: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return change


def _delete(*path: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("format_version", to=2), "format_version 2, this cascade-rt reads 1; install a newer cascade-rt"),
        (_set("format_version", to=0), "export the bundle again"),
        (_set("format_version", to=True), "format_version: found 'True', expected int"),
        (_delete("labels"), "has no 'labels'"),
        (_set("labels", to=["one"]), "at least two different"),
        (_set("labels", to=["a", "a", "b"]), "at least two different"),
        (_set("labels", to=["a", 1, "b"]), "at least two different"),
        (_set("labels", to=["a", "b"]), r"answered logits of shape \(1, 3\), expected \(1, 2\)"),
        (_set("pair", to=0), "pair: found '0', expected bool"),
        (_set("max_length", to=2), "expected int of at least 3"),
        (_set("max_length", to=10**30), "max_length"),
        (_set("max_length", to=32.5), "max_length"),
        (_set("members", to=[]), "members: found none"),
        (_set("members", 0, to="tiny"), "expected an object"),
        (_set("members", 0, "threshold", to=None), "null for the last member only"),
        (_set("members", 2, "threshold", to=0.5), "null for the last member only"),
        (_set("members", 0, "threshold", to=1.5), "from 0 to 1"),
        (_set("members", 0, "threshold", to=float("nan")), "threshold: found 'nan'"),
        (_set("members", 0, "threshold", to="0.5"), "threshold: found '0.5', expected float"),
        (_set("members", 0, "layers", to=3), "ascending"),
        (_set("members", 1, "name", to="tiny"), "share a name"),
        (_set("members", 0, "file", to="../tiny.onnx"), "stays inside the bundle's folder"),
        (_set("members", 0, "file", to="/etc/passwd"), "stays inside the bundle's folder"),
        (_set("members", 0, "file", to="a/../../b"), "stays inside the bundle's folder"),
        (_set("members", 0, "file", to="C:\\model.onnx"), "stays inside the bundle's folder"),
        (_set("members", 0, "file", to=""), "stays inside the bundle's folder"),
        (_set("members", 0, "file", to="other.onnx"), "other.onnx: is missing"),
        (_set("members", 0, "sha256", to="0" * 64), "tiny.onnx: truncated or altered"),
        (_set("members", 0, "file", to="big.onnx"), "big.onnx: truncated or altered"),
        (_set("members", 0, "intermediate_size", to="abc"), "intermediate_size: found 'abc', expected int"),
        (_set("members", 0, "intermediate_size", to=-5), "expected int of at least 1"),
        (_set("tokenizer", to=[]), "tokenizer: found"),
        (_set("tokenizer", "file", to="../tokenizer.json"), "stays inside"),
        (_delete("provenance"), "has no 'provenance'"),
    ],
)
def test_a_wrong_manifest_is_refused(copied: Path, change: Callable[[Manifest], None], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        CascadeRuntime(altered(copied, change)).predict(["a film"])


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


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": 1e400}', "\udcff"])
def test_a_manifest_that_is_none_is_refused(copied: Path, content: str) -> None:
    (copied / "cascade.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"cascade\.json"):
        read_bundle(copied)


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: no bundle there"):
        read_bundle(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_when_told(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--overwrite"), write_bundle(copied):
        pass
    with pytest.raises(ZeroDivisionError), write_bundle(copied, overwrite=True):
        _ = 1 / 0
    read_bundle(copied)  # still whole
    with pytest.raises(BundleError, match="not valid JSON"), write_bundle(copied, overwrite=True) as folder:
        (folder / "cascade.json").write_text("what cannot be read is not written")
    read_bundle(copied)
    with write_bundle(copied, overwrite=True) as folder:
        shutil.copytree(copied, folder, dirs_exist_ok=True)
        altered(folder, _set("note", to="new"))
    assert read_bundle(copied).other == {"note": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"), write_bundle(tmp_path / "thesis", overwrite=True):
        pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_replacement_is_one_step(copied: Path) -> None:
    """Whoever reads meanwhile finds the old bundle or the new one, never none."""
    import sys
    import threading

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


def test_without_an_exchange_of_names_it_is_replaced_all_the_same(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade_rt import bundle as module

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    with write_bundle(copied, overwrite=True) as folder:
        shutil.copytree(copied, folder, dirs_exist_ok=True)
        altered(folder, _set("note", to="new"))
    assert read_bundle(copied).other == {"note": "new"}
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_change_that_breaks_the_seal_is_refused_with_the_remedy(copied: Path) -> None:
    path = copied / "cascade.json"
    path.write_text(path.read_text("utf-8").replace('"good"', '"gold"'), "utf-8")
    with pytest.raises(BundleError, match=r"cascade.json: altered .* delete its last key, 'sha256', if you meant"):
        read_bundle(copied)
    manifest = json.loads(path.read_text("utf-8"))
    assert list(manifest)[-1] == "sha256"
    del manifest["sha256"]
    path.write_text(json.dumps(manifest), "utf-8")
    assert "gold" in read_bundle(copied).labels


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


def test_unverified_files_are_not_hashed_but_must_be_there(copied: Path) -> None:
    original = (copied / "big.onnx").read_bytes()
    (copied / "big.onnx").write_bytes(original + b"\x00\x00")
    with pytest.raises(BundleError, match="altered"):
        CascadeRuntime(copied)
    (copied / "tiny.onnx").unlink()
    with pytest.raises(BundleError, match=r"tiny\.onnx: is missing"):
        CascadeRuntime(copied, verify=False)
