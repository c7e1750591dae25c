"""An open bundle, and a plan of how its members answer: frozen values, whose variants are made by `replace`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..bundle import MANIFEST, Bundle, read_bundle, verify_member
from ..bundle.files import file_identity
from ..bundle.manifest import HIDDEN_STATES, TOKENS
from ..errors import BundleError
from ..types import Prediction, Text, Trace
from .backends import usable
from .cost import cumulative_layers
from .execution import Execution
from .exit_rules import ExitRule
from .prepared import OFF
from .stage import Stage
from .task import Task, task_of
from .tokenization import Encoded, TextTokenizer
from .windows import Windows


@dataclass(frozen=True)
class OpenBundle:
    """A verified bundle, its tokenizer, and one stage per member, shared by the variants of a runtime."""

    model_dir: str | Path
    execution: Execution
    verify: bool
    bundle: Bundle
    tokenizer: TextTokenizer
    stages: Mapping[str, Stage]
    """By the member's name; a stage makes its sessions when it first runs. Empty when closed."""

    @classmethod
    def open(
        cls,
        model_dir: str | Path,
        execution: Execution,
        *,
        members: Sequence[str] | None = None,
        verify: bool = True,
        expected_sha256: str | None = None,
    ) -> OpenBundle:
        """Read and verify a bundle; arguments as for `CascadeRuntime`."""
        settings = usable(execution if verify else replace(execution, cache=OFF))
        if Path(model_dir).exists():  # else it may be on the hub
            model_dir = Path(model_dir).absolute()  # members are loaded later, perhaps from another working directory
        bundle = read_bundle(model_dir, members, verify=verify, expected_sha256=expected_sha256, lazily=True)
        folder = bundle.folder or Path(model_dir)
        tokenizer = TextTokenizer(
            folder / bundle.tokenizer_file, bundle.max_length, bundle.pair, word_cache=execution.word_cache
        )
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
                settings,
                leaves_hidden_states=follower == HIDDEN_STATES,
                check=partial(verify_member, bundle, entry, verify=verify),
            )
            for entry, follower in zip(bundle.members, followers, strict=True)
        }
        if file_identity(folder / MANIFEST) != bundle.identity:  # members would be loaded from another bundle
            raise BundleError(f"{folder}: replaced while it was opened; open it again")
        return cls(model_dir, execution, verify, bundle, tokenizer, stages)


@dataclass(frozen=True)
class Plan:
    """The members that answer, and the rule by which texts leave."""

    opened: OpenBundle
    bundle: Bundle
    """The manifest, with the members that answer."""
    rule: ExitRule
    trace: Callable[[Trace], object] | None = None
    windows: Windows | None = None
    """The way to read texts of too many tokens; None cuts them."""

    task: Task = field(init=False)
    """The meaning of logits."""
    stages: tuple[Stage, ...] = field(init=False)
    """One for each member; none when closed."""
    layers: tuple[int, ...] = field(init=False)
    """Encoder layers executed by a text that leaves at each member."""

    def __post_init__(self) -> None:
        """Derive what follows from the members; raise InvalidOption for windows that share too much."""
        if self.windows is not None:
            self.tokenizer.check_stride(self.windows.stride)
        members, stages = self.bundle.members, self.opened.stages
        derived = {
            "task": task_of(self.bundle),
            "stages": tuple(stages[member.name] for member in members if stages),
            "layers": tuple(cumulative_layers(members).tolist()),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, which all members share."""
        return self.opened.tokenizer

    @property
    def window(self) -> int | None:
        """Tokens of a full window; None where texts are cut."""
        return None if self.windows is None else self.bundle.max_length

    def encode(self, texts: Sequence[Text]) -> Encoded:
        """Encode texts or pairs, as rows for the stages; errors as of `TextTokenizer.encode`."""
        return self.tokenizer.encode(texts, None if self.windows is None else self.windows.stride)

    def only(self, members: Sequence[str] | None) -> Plan:
        """Return the plan with other members, by name; None for all that were opened."""
        whole = self.opened.bundle
        bundle = whole if members is None else whole.only(members)
        return replace(self, bundle=bundle, rule=self.rule.among(self.bundle.members, bundle.members))

    def prediction(
        self, probabilities: Sequence[float], winner: int, exit: int, truncated: bool, rows: int = 1
    ) -> Prediction:
        """Return the answer to one text; `winner`: its most probable class, `rows`: those that it has."""
        names = self.bundle.labels
        labels = self.task.labels(names, probabilities, winner)
        layers = rows * self.layers[exit]
        return Prediction(names[winner], probabilities[winner], tuple(probabilities), exit, layers, truncated, labels)
