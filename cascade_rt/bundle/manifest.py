"""The manifest `cascade.json`: its schema as data classes, read with one clear error for whatever is wrong.

Version 1 describes cascades of complete members with maximum probability as their exit rule. Version 2 adds segments,
which read the hidden states of the member before them, and other exit rules. Version 3 adds tasks other than
`single_label`, and members that are ordered by cost and not by layers, of which they may have 0. A bundle is written in
the lowest version that can express it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, InvalidOption
from .files import FileIdentity, sha256_of
from .paths import checked_relative
from .precisions import known_precision

MANIFEST = "cascade.json"
TUNING = "tuning"
TRADE_OFFS = "trade_offs"  # among what tuning writes
"""The manifest's key for what `cascade-rt tune` found."""

BATCH_TOLERANCE = 1e-4
"""Largest difference of a class probability between two batchings that counts as none."""

TOKENS, HIDDEN_STATES = "tokens", "hidden_states"
"""Inputs of a member: token ids, or the hidden states that the member before it left."""

MAXIMUM_PROBABILITY, ENTROPY, PATIENCE = "maximum_probability", "entropy", "patience"
"""Kinds of exit rules."""

EXIT_RULES: dict[str, Any] = {}
"""The classes of all exit rules by their kind, which `engine.exit_rules.register` fills."""

SINGLE_LABEL, MULTI_LABEL = "single_label", "multi_label"
"""Tasks: one label per text, or several."""

TASKS = (SINGLE_LABEL, MULTI_LABEL)

_VERSIONS = (1, 2, 3)
_SEAL = "sha256"  # of the manifest without this key; manifests of other writers may have none
_MANIFEST_BYTES = 16 * 2**20  # far above any real manifest
_LONGEST_NAME = 1000  # characters of a label, or of a member's name
_WINDOWS = ("stride", "aggregate")  # keys of what tuning says of its texts
_PAPER = {"kind": MAXIMUM_PROBABILITY}
TYPICAL_TOKENS = 128
"""Length of the text by which members are compared by cost."""


@dataclass(frozen=True)
class WeightFile:
    """A file that holds weights of an ONNX file; its path is relative to the bundle's folder."""

    file: str
    sha256: str

    @classmethod
    def of(cls, folder: Path, file: str) -> WeightFile:
        """Return the entry of a file in a bundle's folder; hashes it."""
        return cls(file, sha256_of(folder / file))


@dataclass(frozen=True)
class MemberEntry:
    """The manifest's entry of one member."""

    name: str
    file: str
    sha256: str
    layers: int
    hidden_size: int
    parameters: int
    precision: str
    threshold: float | None
    """None for the last member, which always answers, and under exit rules without thresholds."""
    intermediate_size: int | None = None
    """Inner size of the feed-forward blocks; None: four times the hidden size."""
    data: tuple[WeightFile, ...] = ()
    """External data of the ONNX file."""
    reads: str = TOKENS
    """Its input: "tokens", or "hidden_states" for a segment of a multi-exit model."""
    positions: int | None = None
    """The most tokens that it can take; None where that is not known."""
    exit_flops: tuple[int, ...] = ()
    """FLOPs of a segment's exit for a text of n tokens: the factors of 1, n and n^2; () where they are not counted."""
    flops: tuple[int, ...] = ()
    """FLOPs of the whole member for a text of n tokens, as `exit_flops`; () for those of `encoder_flops`."""
    weight_bits: int = 8
    """Bits of the int8 weights of its products; with 7, no CPU's kernels saturate."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Keys unknown to this version, kept as they are."""

    def files(self, path: Path) -> list[Path]:
        """Return its files, the external data after the ONNX file, which is at `path`."""
        folder = path.parents[len(PurePosixPath(self.file).parts) - 1]
        return [path, *(folder / file.file for file in self.data)]

    def size(self, path: Path) -> int:
        """Return the bytes of its files; `path` as of `files`."""
        return sum(file.stat().st_size for file in self.files(path))

    def cost(self, tokens: NDArray[Any] | float) -> Any:
        """FLOPs of the member for texts with this many tokens, float64, in the shape of `tokens`.

        Those of `encoder_flops`, and of the exits of a multi-exit model before its last; or those that the member
        states.
        """
        n = np.asarray(tokens, dtype=np.float64)
        if self.flops:
            return np.polynomial.polynomial.polyval(n, self.flops)
        encoder = encoder_flops(self.layers, self.hidden_size, self.intermediate_size, n)
        return encoder + np.polynomial.polynomial.polyval(n, self.exit_flops or (0,))


def encoder_flops(
    layers: int, hidden_size: int, intermediate_size: int | None, tokens: NDArray[Any] | float = TYPICAL_TOKENS
) -> Any:
    """FLOPs of an encoder, float64, in the shape of `tokens`; embeddings, pooler and classifier are left out.

    A layer of hidden size h and inner size i does 4 h^2 + 2 h i multiply-adds per token in its projections, and 2 h per
    pair of tokens in its attention, at two FLOPs each. For h = 768 and 128 tokens the projections take 1811.9M (the
    paper quotes 1809.9M a layer).
    """
    hidden = float(hidden_size)
    inner = float(intermediate_size or 4 * hidden)
    n = np.asarray(tokens, dtype=np.float64)
    return 2 * layers * (n * (4 * hidden**2 + 2 * hidden * inner) + 2 * hidden * n**2)


@dataclass(frozen=True)
class Tuning:
    """The part of the manifest's `tuning` that the runtime needs."""

    members: list[str]
    """Names of the members to use, small to big."""
    thresholds: list[float]
    """One for each of them but the last; none under exit rules without thresholds."""
    exits: list[int]
    """Texts that each of them answered when it was tuned."""
    windows: Mapping[str, Any] = field(default_factory=dict)
    """The settings by which long texts were read in windows; none where they were cut."""


@dataclass(frozen=True)
class Bundle:
    """A manifest: the labels (index = class id), the tokenizer's file, and the members from small to big."""

    labels: tuple[str, ...]
    pair: bool
    max_length: int
    tokenizer_file: str
    tokenizer_sha256: str
    members: tuple[MemberEntry, ...]
    provenance: Mapping[str, Any]
    exit_rule: Mapping[str, Any] = field(default_factory=lambda: dict(_PAPER))
    """Kind of exit rule and its settings; maximum probability unless the manifest says otherwise."""
    task: str = SINGLE_LABEL
    """The meaning of logits, one of TASKS."""
    cuts: tuple[float, ...] = ()
    """With several labels per text: the probability above which a text has each label; () for 0.5."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Keys unknown to this version, kept as they are."""

    folder: Path | None = field(default=None, compare=False, kw_only=True)
    """The folder that it was read from."""
    root: Path | None = field(default=None, compare=False, kw_only=True)
    """The folder that its files have to stay inside."""
    identity: FileIdentity | None = field(default=None, compare=False, kw_only=True)
    """File identity of the manifest when it was read."""
    sha256: str | None = field(default=None, compare=False, kw_only=True)
    """Hash of the manifest's content when it was read."""

    @property
    def format_version(self) -> int:
        """The lowest version of the format that can express this bundle."""
        layers = _layers(self.members)
        newer = any(not member.layers for member in self.members)
        if self.task != SINGLE_LABEL or newer or sorted(layers) != layers:
            return 3
        return 1 if self.is_cascade else 2

    @property
    def is_cascade(self) -> bool:
        """True if all members are complete models and texts leave by maximum probability."""
        return self.exit_rule["kind"] == MAXIMUM_PROBABILITY and all(member.reads == TOKENS for member in self.members)

    @property
    def thresholds(self) -> list[float]:
        """The thresholds of all members but the last; empty under exit rules without thresholds."""
        return [member.threshold for member in self.members if member.threshold is not None]

    @property
    def chains(self) -> list[int]:
        """For each member, where its model starts: its own index, or that of the first segment before it."""
        starts: list[int] = []
        for index, member in enumerate(self.members):
            starts.append(index if member.reads == TOKENS else starts[-1])
        return starts

    @property
    def tuning(self) -> Tuning | None:
        """The choice of tuning; None where nothing was tuned."""
        found = self.other.get(TUNING)
        if not isinstance(found, dict):
            return None
        data = found.get("data")
        windows = {key: data[key] for key in _WINDOWS if key in data} if isinstance(data, dict) else {}
        return Tuning(found["members"], found["thresholds"], found["exits"], windows)

    def tuned(self) -> Bundle:
        """Return the bundle with the members and thresholds that tuning chose; unchanged where nothing was tuned."""
        return self if self.tuning is None else self.only(self.tuning.members)

    def only(self, names: Sequence[str]) -> Bundle:
        """Return the bundle with some members, by name.

        Raises InvalidOption for an unknown name, and for a segment without the member whose hidden states it reads.
        """
        known = [member.name for member in self.members]
        names = [names] if isinstance(names, str) else list(names)
        if not names or not set(names) <= set(known):
            raise InvalidOption("members", names, f"some of: {', '.join(known)}")
        kept = [member for member in self.members if member.name in names]
        for member in kept:
            before = known[max(0, known.index(member.name) - 1)]
            if member.reads == HIDDEN_STATES and before not in names:
                raise InvalidOption("members", names, f"{before!r} too, whose hidden states {member.name!r} reads")
        return replace(self, members=(*kept[:-1], replace(kept[-1], threshold=None)))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it stands in `cascade.json`, with its seal."""
        manifest = {
            "format_version": self.format_version,
            "labels": list(self.labels),
            "pair": self.pair,
            "max_length": self.max_length,
            "tokenizer": {"file": self.tokenizer_file, "sha256": self.tokenizer_sha256},
            **({} if self.exit_rule == _PAPER else {"exit_rule": dict(self.exit_rule)}),
            **({} if self.task == SINGLE_LABEL else {"task": self.task}),
            **({"cuts": list(self.cuts)} if self.cuts else {}),
            "members": [
                {
                    "name": member.name,
                    "file": member.file,
                    "sha256": member.sha256,
                    "layers": member.layers,
                    "hidden_size": member.hidden_size,
                    "parameters": member.parameters,
                    "precision": member.precision,
                    "threshold": member.threshold,
                    **({} if member.intermediate_size is None else {"intermediate_size": member.intermediate_size}),
                    **({} if member.positions is None else {"positions": member.positions}),
                    **({"data": [vars(file) for file in member.data]} if member.data else {}),
                    **({} if member.reads == TOKENS else {"reads": member.reads}),
                    **({"exit_flops": list(member.exit_flops)} if member.exit_flops else {}),
                    **({"flops": list(member.flops)} if member.flops else {}),
                    **({} if member.weight_bits == 8 else {"weight_bits": member.weight_bits}),
                    **member.other,
                }
                for member in self.members
            ],
            "provenance": dict(self.provenance),
            **self.other,
        }
        return manifest | {_SEAL: _digest(manifest)}


def models(members: Sequence[MemberEntry]) -> list[list[MemberEntry]]:
    """Return the models of which a bundle consists: each a member, or a chain of segments."""
    found: list[list[MemberEntry]] = []
    for member in members:
        if member.reads == TOKENS:
            found.append([])
        found[-1].append(member)
    return found


def _layers(members: Sequence[MemberEntry]) -> list[int]:
    """Return the number of layers of each model."""
    return [sum(member.layers for member in model) for model in models(members)]


def read_manifest(folder: Path) -> Bundle:
    """Read `cascade.json` and check its seal and schema; raise BundleError for whatever is wrong."""
    manifest = _load(folder)
    return replace(_parse(manifest), sha256=_digest(manifest))


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, whatever its layout in the file."""
    plain = {key: value for key, value in manifest.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _load(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder}: no bundle there (found no {MANIFEST}); expected a folder that cascade-rt export wrote"
        )
    if path.stat().st_size > _MANIFEST_BYTES:
        raise BundleError(
            f"{path}: over {_MANIFEST_BYTES // 2**20} MiB, too big for a manifest; export the bundle again"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export or copy the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: found {type(manifest).__name__}, expected a JSON object; export the bundle again")
    if manifest.get(_SEAL, found := _digest(manifest)) != found:
        raise BundleError(
            f"{path}: altered (found sha256 {found[:12]}..., expected {str(manifest[_SEAL])[:12]}...); export or copy "
            f"the bundle again, or delete its last key, {_SEAL!r}, if the change was intended"
        )
    return manifest


def _parse(manifest: dict[str, Any]) -> Bundle:
    top = ManifestFields(manifest, MANIFEST)
    top.rest.pop(_SEAL, None)
    version = top.take("format_version", int)
    if version not in _VERSIONS:
        remedy = "install a newer cascade-rt" if version > max(_VERSIONS) else "export the bundle again"
        known = ", ".join(map(str, _VERSIONS[:-1])) + f" and {_VERSIONS[-1]}"
        raise BundleError(f"{MANIFEST}: found format_version {version}, this cascade-rt reads {known}; {remedy}")
    labels = top.take("labels", list)
    if len(labels) < 2 or not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise BundleError(f"{MANIFEST}: labels: found {str(labels)[:80]}, expected at least two different texts")
    if longest := [label for label in labels if len(label) > _LONGEST_NAME]:
        raise BundleError(
            f"{MANIFEST}: labels: found one of {len(longest[0]):,} characters ({longest[0][:40]!r}...), expected at "
            f"most {_LONGEST_NAME:,}; give it a shorter name"
        )
    task, cuts = _parse_task(top, len(labels)) if version > 2 else (SINGLE_LABEL, ())
    tokenizer = ManifestFields(top.take("tokenizer", dict), f"{MANIFEST}: tokenizer")
    exit_rule = _parse_exit_rule(top.rest.pop("exit_rule", _PAPER)) if version > 1 else dict(_PAPER)
    entries = top.take("members", list)
    if not entries:
        raise BundleError(f"{MANIFEST}: members: found none, expected at least one")
    has_thresholds = EXIT_RULES[exit_rule["kind"]].parameter == "thresholds"
    with_thresholds = [has_thresholds and index < len(entries) - 1 for index in range(len(entries))]
    members = tuple(
        _parse_member(entry, f"{MANIFEST}: members[{index}]", version, thresholds)
        for index, (entry, thresholds) in enumerate(zip(entries, with_thresholds, strict=True))
    )
    if any(len(member.name) > _LONGEST_NAME for member in members):
        raise BundleError(f"{MANIFEST}: members: expected names of at most {_LONGEST_NAME:,} characters")
    if len({member.name for member in members}) != len(members):
        raise BundleError(f"{MANIFEST}: members: two members share a name; expected different names")
    if members[0].reads != TOKENS:
        raise BundleError(f"{MANIFEST}: members[0]: reads hidden states, but no member is before it; expected tokens")
    layers = _layers(members)
    costs = [sum(float(member.cost(TYPICAL_TOKENS)) for member in model) for model in models(members)]
    if sorted(layers) != layers and (version < 3 or sorted(costs) != costs):
        expected = "ascending numbers of layers" if version < 3 else "ascending numbers of layers, or ascending FLOPs"
        raise BundleError(f"{MANIFEST}: members: expected {expected}, small to big")
    max_length = top.take("max_length", int, at_least=3)
    for member in members:
        if member.positions is not None and max_length > member.positions:
            raise BundleError(
                f"{MANIFEST}: max_length: found {max_length}, expected at most {member.positions}, the positions of "
                f"member {member.name!r}; export the bundle again"
            )
    _check_tuning(top.rest.get(TUNING), members)
    return Bundle(
        labels=tuple(labels),
        pair=top.take("pair", bool),
        max_length=max_length,
        tokenizer_file=checked_relative(tokenizer.take("file", str), MANIFEST),
        tokenizer_sha256=tokenizer.take("sha256", str),
        members=members,
        provenance=top.take("provenance", dict),
        exit_rule=exit_rule,
        task=task,
        cuts=cuts,
        other=top.rest,
    )


def _parse_exit_rule(entry: Any) -> dict[str, Any]:
    where = f"{MANIFEST}: exit_rule"
    if not isinstance(entry, dict):
        raise BundleError(f"{where}: found {type(entry).__name__}, expected an object; export the bundle again")
    fields = ManifestFields(entry, where)
    kind = fields.take("kind", str)
    if kind not in EXIT_RULES:
        raise BundleError(
            f"{where}: found the kind {kind[:80]!r}, this cascade-rt knows {', '.join(EXIT_RULES)}; "
            "install a newer cascade-rt"
        )
    return {"kind": kind, **EXIT_RULES[kind].read(fields), **fields.rest}


def _parse_task(top: ManifestFields, labels: int) -> tuple[str, tuple[float, ...]]:
    task = top.take("task", str) if "task" in top.rest else SINGLE_LABEL
    if task not in TASKS:
        raise BundleError(
            f"{MANIFEST}: task: found {task[:80]!r}, this cascade-rt knows {', '.join(TASKS)}; install a newer "
            "cascade-rt"
        )
    cuts = top.take("cuts", list) if task == MULTI_LABEL and "cuts" in top.rest else []
    if cuts and (len(cuts) != labels or not all(type(cut) in (int, float) and 0 <= cut < 1 for cut in cuts)):
        raise BundleError(f"{MANIFEST}: cuts: found {str(cuts)[:80]}, expected {labels} numbers from 0 to below 1")
    return task, tuple(map(float, cuts))


def _parse_member(entry: Any, where: str, version: int, with_threshold: bool) -> MemberEntry:
    if not isinstance(entry, dict):
        raise BundleError(f"{where}: found {type(entry).__name__}, expected an object; export the bundle again")
    fields = ManifestFields(entry, where)
    threshold = fields.take("threshold", float, type(None))
    if (threshold is not None) != with_threshold:
        wanted = "a number" if with_threshold else "null, as this member has no threshold"
        raise BundleError(
            f"{where}: threshold: found {'null' if threshold is None else threshold}, expected {wanted}; "
            "the last member's is null, and all are under exit rules without thresholds"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise BundleError(f"{where}: threshold: found {threshold}, expected a number from 0 to 1")
    reads = fields.take("reads", str) if version > 1 and "reads" in entry else TOKENS
    if reads not in (TOKENS, HIDDEN_STATES):
        raise BundleError(f"{where}: reads: found {reads[:80]!r}, expected {TOKENS!r} or {HIDDEN_STATES!r}")
    exit_flops = fields.factors("exit_flops") if version > 1 else ()
    flops = fields.factors("flops")
    return MemberEntry(
        name=fields.take("name", str),
        file=checked_relative(fields.take("file", str), MANIFEST),
        sha256=fields.take("sha256", str),
        layers=fields.take("layers", int, at_least=1 if version < 3 else 0),
        hidden_size=fields.take("hidden_size", int, at_least=1),
        parameters=fields.take("parameters", int, at_least=1),
        precision=known_precision(fields.take("precision", str), where),
        threshold=threshold,
        intermediate_size=fields.take("intermediate_size", int, at_least=1) if "intermediate_size" in entry else None,
        data=tuple(_parse_data(file, where) for file in fields.take("data", list)) if "data" in entry else (),
        reads=reads,
        positions=fields.take("positions", int, at_least=3) if "positions" in entry else None,
        weight_bits=fields.take("weight_bits", int, at_least=1) if "weight_bits" in entry else 8,
        exit_flops=exit_flops,
        flops=flops,
        other=fields.rest,
    )


def _parse_data(entry: Any, where: str) -> WeightFile:
    if not isinstance(entry, dict):
        raise BundleError(f"{where}: data: found {type(entry).__name__}, expected an object; export the bundle again")
    fields = ManifestFields(entry, f"{where}: data")
    return WeightFile(checked_relative(fields.take("file", str), MANIFEST), fields.take("sha256", str))


def _check_tuning(tuning: Any, members: Sequence[MemberEntry]) -> None:
    """Refuse a tuning that the runtime could not follow; its other keys are not checked."""
    if tuning is None:
        return
    where = f"{MANIFEST}: {TUNING}"
    if not isinstance(tuning, dict):
        raise BundleError(f"{where}: found {type(tuning).__name__}, expected an object; tune the bundle again")
    fields = ManifestFields(tuning, where)
    names, taus, counts = (fields.take(key, list) for key in ("members", "thresholds", "exits"))
    chosen = [member for member in members if member.name in names]
    if not names or names != [member.name for member in chosen]:
        raise BundleError(f"{where}: found the members {str(names)[:80]}, expected some of the bundle's, in order")
    before = [members[max(0, members.index(member) - 1)] for member in chosen if member.reads == HIDDEN_STATES]
    if not all(member in chosen for member in before):
        raise BundleError(f"{where}: found the members {str(names)[:80]}, expected each segment after the one it reads")
    if taus != [member.threshold for member in chosen[:-1] if member.threshold is not None]:
        raise BundleError(f"{where}: found thresholds {str(taus)[:80]} unlike the members' own; tune the bundle again")
    whole = all(type(count) is int and 0 <= count < 2**31 for count in counts)
    if len(counts) != len(names) or not whole or sum(counts) == 0:
        raise BundleError(f"{where}: exits: found {str(counts)[:80]}, expected one count of texts per member")


class ManifestFields:
    """Takes known fields out of a JSON object and checks their types; what remains is unknown and kept."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.rest = dict(fields)
        self._where = where

    def factors(self, key: str) -> tuple[int, ...]:
        """Take at most three factors of a polynomial; () where there are none."""
        found = self.take(key, list) if key in self.rest else []
        if len(found) > 3 or not all(type(factor) is int and 0 <= factor < 2**63 for factor in found):
            raise BundleError(f"{self._where}: {key}: found {str(found)[:80]}, expected at most three whole numbers")
        return tuple(found)

    def take(self, key: str, *types: type, at_least: int | None = None) -> Any:
        """Take a value of one of these types; raise BundleError for any other."""
        if key not in self.rest:
            raise BundleError(f"{self._where}: has no {key!r}; export the bundle again")
        value = self.rest.pop(key)
        if float in types and type(value) is int and abs(value) <= 1:
            value = float(value)
        wanted = type(value) in types  # exact: bool is a subclass of int
        if wanted and isinstance(value, float):
            wanted = math.isfinite(value)
        if wanted and isinstance(value, int) and not isinstance(value, bool):
            wanted = (at_least or 0) <= value < 2**63
        if not wanted:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            bound = "" if at_least is None else f" of at least {at_least}"
            raise BundleError(f"{self._where}: {key}: found {str(value)[:80]!r}, expected {names}{bound}")
        return value
