"""A bundle that was opened: what runtimes with different members or thresholds share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import MANIFEST, Bundle, read_bundle
from ..bundle.files import file_identity
from ..bundle.manifest import HIDDEN_STATES, TOKENS
from ..errors import BundleError
from .cpus import spin_duration, usable_threads
from .providers import provider_name
from .stage import Stage
from .tokenization import TextTokenizer


@dataclass(frozen=True)
class Opened:
    """A verified bundle, its tokenizer, one stage per member, and the settings that it was opened with."""

    model_dir: str | Path
    provider: str
    threads: int | None
    provider_options: Mapping[str, str] | None
    spin_us: int | None
    verify: bool
    bundle: Bundle
    tokenizer: TextTokenizer
    stages: Mapping[str, Stage]
    """By the member's name; a stage makes its session when it first runs."""

    @classmethod
    def open(
        cls,
        model_dir: str | Path,
        members: Sequence[str] | None,
        provider: str,
        threads: int | None,
        provider_options: Mapping[str, str] | None,
        spin_us: int | None,
        verify: bool,
        expected_sha256: str | None,
    ) -> Opened:
        """Read and verify a bundle; arguments as for `CascadeRuntime`."""
        wanted, count, spin = provider_name(provider), usable_threads(threads), spin_duration(spin_us)
        if Path(model_dir).exists():  # else it may be on the hub
            model_dir = Path(model_dir).absolute()  # members are loaded later, perhaps from another working directory
        bundle = read_bundle(model_dir, members, verify=verify, expected_sha256=expected_sha256)
        folder = bundle.folder or Path(model_dir)
        tokenizer = TextTokenizer(folder / bundle.tokenizer_file, bundle.max_length, bundle.pair)
        if tokenizer.pads_left and any(entry.reads == HIDDEN_STATES for entry in bundle.members):
            raise BundleError(
                f"{folder}: pads on the left, expected padding on the right where members read hidden states"
            )
        followers = [entry.reads for entry in bundle.members[1:]] + [TOKENS]
        stages = {
            entry.name: Stage(
                entry,
                folder / entry.file,
                len(bundle.labels),
                wanted,
                count,
                provider_options,
                spin_us=spin,
                leaves_hidden_states=follower == HIDDEN_STATES,
            )
            for entry, follower in zip(bundle.members, followers, strict=True)
        }
        if file_identity(folder / MANIFEST) != bundle.identity:  # members would be loaded from another bundle
            raise BundleError(f"{folder}: replaced while it was opened; open it again")
        return cls(model_dir, provider, threads, provider_options, spin, verify, bundle, tokenizer, stages)

    def without_stages(self) -> Opened:
        """Return the same without the stages, so that their sessions can be freed."""
        return replace(self, stages={})
