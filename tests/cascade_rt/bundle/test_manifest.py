"""The manifest: what is written is read, whatever is wrong is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cascade_rt import BundleError, CascadeRuntime, read_bundle
from cascade_rt.bundle import write_manifest

from .manifests import Manifest, altered, delete, set_to


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            set_to("format_version", to=4),
            "format_version 4, this cascade-rt reads 1, 2 and 3; install a newer cascade-rt",
        ),
        (set_to("format_version", to=0), "export the bundle again"),
        (set_to("format_version", to=True), "format_version: found 'True', expected int"),
        (delete("labels"), "has no 'labels'"),
        (set_to("labels", to=["one"]), "at least two different"),
        (set_to("labels", to=["a", "a", "b"]), "at least two different"),
        (set_to("labels", to=["a", 1, "b"]), "at least two different"),
        (set_to("labels", to=["a", "b"]), r"answered logits of shape \(1, 3\), expected \(1, 2\)"),
        (set_to("labels", to=["a" * 1001, "b", "c"]), "labels: found one of 1,001 characters .*at most 1,000"),
        (set_to("members", 0, "name", to="a" * 1001), "expected names of at most 1,000 characters"),
        (set_to("pair", to=0), "pair: found '0', expected bool"),
        (set_to("max_length", to=2), "expected int of at least 3"),
        (set_to("max_length", to=10**30), "max_length"),
        (set_to("max_length", to=32.5), "max_length"),
        (set_to("members", 0, "positions", to=8), "found 32, expected at most 8, the positions of member 'tiny'"),
        (set_to("members", to=[]), "members: found none"),
        (set_to("members", 0, to="tiny"), "expected an object"),
        (
            set_to("members", 0, "threshold", to=None),
            r"members\[0\]: threshold: found null, expected a number; the last",
        ),
        (
            set_to("members", 2, "threshold", to=0.5),
            r"members\[2\]: threshold: found 0\.5, expected null.*the last member's",
        ),
        (set_to("members", 0, "threshold", to=1.5), "from 0 to 1"),
        (set_to("members", 0, "threshold", to=float("nan")), "threshold: found 'nan'"),
        (set_to("members", 0, "threshold", to="0.5"), "threshold: found '0.5', expected float"),
        (
            set_to("members", 1, "precision", to="int4"),
            r"members\[1\]: precision: found 'int4', this cascade-rt knows fp32, .*; install a newer cascade-rt",
        ),
        (set_to("members", 0, "layers", to=3), "ascending"),
        (set_to("members", 1, "name", to="tiny"), "share a name"),
        (set_to("members", 0, "file", to="../tiny.onnx"), "stays inside the bundle's folder"),
        (set_to("members", 0, "file", to="/etc/passwd"), "stays inside the bundle's folder"),
        (set_to("members", 0, "file", to="a/../../b"), "stays inside the bundle's folder"),
        (set_to("members", 0, "file", to="C:\\model.onnx"), "stays inside the bundle's folder"),
        (set_to("members", 0, "file", to=""), "stays inside the bundle's folder"),
        (set_to("members", 0, "file", to="other.onnx"), "other.onnx: is missing"),
        (set_to("members", 0, "sha256", to="0" * 64), "tiny.onnx: truncated or altered"),
        (set_to("members", 0, "file", to="big.onnx"), "big.onnx: truncated or altered"),
        (set_to("members", 0, "intermediate_size", to="abc"), "intermediate_size: found 'abc', expected int"),
        (set_to("members", 0, "intermediate_size", to=-5), "expected int of at least 1"),
        (set_to("tokenizer", to=[]), "tokenizer: found"),
        (set_to("tokenizer", "file", to="../tokenizer.json"), "stays inside"),
        (delete("provenance"), "has no 'provenance'"),
    ],
)
def test_a_wrong_manifest_is_refused(copied: Path, change: Callable[[Manifest], None], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        CascadeRuntime(altered(copied, change)).predict(["a film"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": 1e400}', "\udcff"])
def test_a_file_that_is_not_a_manifest_is_refused(copied: Path, content: str) -> None:
    (copied / "cascade.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"cascade\.json"):
        read_bundle(copied)


def test_a_change_that_breaks_the_seal_is_refused_with_the_remedy(copied: Path) -> None:
    write_manifest(copied, read_bundle(copied))  # which seals it
    path = copied / "cascade.json"
    path.write_text(path.read_text("utf-8").replace('"good"', '"gold"'), "utf-8")
    with pytest.raises(
        BundleError, match=r"cascade.json: altered .* delete its last key, 'sha256', if the change was intended"
    ):
        read_bundle(copied)
    manifest = json.loads(path.read_text("utf-8"))
    assert list(manifest)[-1] == "sha256"
    del manifest["sha256"]
    path.write_text(json.dumps(manifest), "utf-8")
    assert "gold" in read_bundle(copied).labels


def test_segments_and_other_exit_rules_are_written_as_version_2_and_nothing_else_is(
    bundle: Path, two_segments: Path
) -> None:
    cascade, segments = read_bundle(bundle), read_bundle(two_segments)
    patient = replace(
        cascade,
        exit_rule={"kind": "patience", "patience": 1},
        members=tuple(replace(member, threshold=None) for member in cascade.members),
    )
    by_confidence = replace(
        segments,
        exit_rule={"kind": "maximum_probability"},
        members=(replace(segments.members[0], threshold=0.9), segments.members[1]),
    )
    for made, version, rule, reads in (
        (cascade, 1, None, [None, None, None]),
        (segments, 2, {"kind": "patience", "patience": 1}, [None, "hidden_states"]),
        (patient, 2, {"kind": "patience", "patience": 1}, [None, None, None]),
        (by_confidence, 2, None, [None, "hidden_states"]),
    ):
        written = made.to_json()
        assert (made.format_version, written["format_version"]) == (version, version)
        assert written.get("exit_rule") == rule
        assert [member.get("reads") for member in written["members"]] == reads


def test_both_versions_are_read_as_they_were_written(bundle: Path, two_segments: Path, tmp_path: Path) -> None:
    for number, folder in enumerate((bundle, two_segments)):
        original = json.loads((folder / "cascade.json").read_text("utf-8"))
        made = read_bundle(folder)
        copy = shutil.copytree(folder, tmp_path / str(number))
        write_manifest(copy, made)
        written = json.loads((copy / "cascade.json").read_text("utf-8"))
        assert len(written.pop("sha256")) == 64
        assert written == original
        assert read_bundle(copy) == made


def test_keys_of_version_2_mean_nothing_in_version_1(copied: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["exit_rule"] = {"kind": "patience", "patience": 1}
        manifest["members"][1]["reads"] = "hidden_states"

    right = CascadeRuntime(copied).predict(["a film", "so sad"])
    bundle = read_bundle(altered(copied, change))
    assert bundle.exit_rule == {"kind": "maximum_probability"}
    assert bundle.members[1].reads == "tokens"
    assert bundle.to_json()["exit_rule"] == {"kind": "patience", "patience": 1}, "unknown keys are kept"
    assert CascadeRuntime(copied).predict(["a film", "so sad"]) == right


def test_unknown_keys_of_version_2_are_kept(two_segments: Path, tmp_path: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["members"][1]["colour"] = "blue"
        manifest["note"] = "new"
        manifest["exit_rule"]["why"] = "PABEE"

    folder = altered(shutil.copytree(two_segments, tmp_path / "noted"), change)
    written = read_bundle(folder).to_json()
    assert (written["members"][1]["colour"], written["note"]) == ("blue", "new")
    assert written["exit_rule"] == {"kind": "patience", "patience": 1, "why": "PABEE"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            set_to("exit_rule", "kind", to="margin"),
            "exit_rule: found the kind 'margin', this cascade-rt knows maximum_probability, entropy, patience.*; in",
        ),
        (set_to("exit_rule", "kind", to=3), "exit_rule: kind: found '3', expected str"),
        (set_to("exit_rule", to="patience"), "exit_rule: found str, expected an object"),
        (set_to("exit_rule", to={}), "exit_rule: has no 'kind'"),
        (delete("exit_rule", "patience"), "exit_rule: has no 'patience'"),
        (set_to("exit_rule", "patience", to=0), "patience: found '0', expected int of at least 1"),
        (set_to("exit_rule", "patience", to=1.5), "patience: found '1.5', expected int"),
        (set_to("exit_rule", "patience", to=True), "patience: found 'True', expected int"),
        (set_to("members", 1, "reads", to="logits"), "reads: found 'logits', expected 'tokens' or 'hidden_states'"),
        (set_to("members", 1, "reads", to=None), "reads: found 'None', expected str"),
        (
            set_to("members", 0, "reads", to="hidden_states"),
            r"members\[0\]: reads hidden states, but no member is before",
        ),
        (set_to("members", 0, "threshold", to=0.5), r"members\[0\]: threshold: found 0\.5, expected null"),
        (set_to("members", 0, "exit_flops", to=[1, -2]), r"exit_flops: found \[1, -2\], expected at most three whole"),
        (set_to("members", 0, "exit_flops", to=5), "exit_flops: found '5', expected list"),
        (
            set_to("exit_rule", "kind", to="maximum_probability"),
            r"members\[0\]: threshold: found null, expected a number",
        ),
        (set_to("exit_rule", "kind", to="entropy"), r"members\[0\]: threshold: found null, expected a number"),
        (delete("members", 1, "reads"), "has the inputs hidden_states, attention_mask; expected input_ids"),
        (set_to("members", 0, "file", to="segment-2.onnx"), "segment-2.onnx: truncated or altered"),
    ],
)
def test_a_wrong_manifest_of_version_2_is_refused(
    two_segments: Path, tmp_path: Path, change: Callable[[Manifest], None], says: str
) -> None:
    folder = altered(shutil.copytree(two_segments, tmp_path / "wrong"), change)
    with pytest.raises(BundleError, match=says):
        CascadeRuntime(folder).predict(["a film"])


def test_a_segment_whose_predecessor_leaves_no_hidden_states_is_refused(copied: Path, two_segments: Path) -> None:
    """The bundle's second member is told to read what its first, a whole classifier, does not leave."""
    shutil.copy(two_segments / "segment-2.onnx", copied)
    last = json.loads((two_segments / "cascade.json").read_text("utf-8"))["members"][1]

    def change(manifest: Manifest) -> None:
        manifest["format_version"] = 2
        manifest["members"] = [manifest["members"][0], last]

    with pytest.raises(BundleError, match=r"tiny\.onnx: has the outputs logits; expected last_hidden_state among them"):
        CascadeRuntime(altered(copied, change)).predict(["a film"])
