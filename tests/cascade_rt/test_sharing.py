"""A runtime that is shared: never changed from outside, cheap to vary, closed, pickled, used by many threads."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cascade_rt import BundleError, CascadeError, CascadeRuntime, InvalidOption, Trace, read_bundle
from cascade_rt.bundle import write_manifest

from ..toy import WORDS
from .bundle.manifests import altered, set_to

_DRAW = random.Random(3)
TEXTS = [" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(0, 40))) for _ in range(80)]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that sessions were made of, in order."""
    made: list[str] = []
    make = onnxruntime.InferenceSession

    def counted(path: str, *arguments: Any, **options: Any) -> Any:
        made.append(Path(path).name)
        return make(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    return made


@pytest.fixture
def tuned(copied: Path) -> Path:
    """A bundle of which tuning chose the smallest and the biggest member."""
    tuning = {"members": ["tiny", "big"], "thresholds": [0.8], "exits": [3, 2]}
    return altered(copied, set_to("tuning", to=tuning))


VARIANTS: list[tuple[Callable[[CascadeRuntime], CascadeRuntime], dict[str, Any]]] = [
    (lambda runtime: runtime.with_thresholds(0.6), {"thresholds": 0.6}),
    (lambda runtime: runtime.with_thresholds([0.5, 0.9]), {"thresholds": [0.5, 0.9]}),
    (lambda runtime: runtime.with_thresholds(None), {}),
    (lambda runtime: runtime.with_members(["big", "tiny"]), {"members": ["tiny", "big"]}),
    (lambda runtime: runtime.with_members(["small"]), {"members": ["small"]}),
    (lambda runtime: runtime.with_members(["tiny", "small"]).with_members(None), {}),
    (
        lambda runtime: runtime.with_members(["small", "big"]).with_thresholds(0.55),
        {"members": ["small", "big"], "thresholds": 0.55},
    ),
    (
        lambda runtime: runtime.with_thresholds([0.5, 0.95]).with_members(["small", "big"]),
        {"members": ["small", "big"], "thresholds": [0.95]},
    ),
    (lambda runtime: runtime.with_trace(lambda _: None), {}),
    (lambda runtime: runtime.with_thresholds(0.6).with_trace(lambda _: None), {"thresholds": 0.6}),
]


@pytest.mark.parametrize(("vary", "settings"), VARIANTS)
def test_a_variant_equals_a_runtime_opened_that_way_and_shares_the_sessions(
    bundle: Path,
    sessions: list[str],
    vary: Callable[[CascadeRuntime], CascadeRuntime],
    settings: dict[str, Any],
) -> None:
    runtime = CascadeRuntime(bundle, preload=True)
    before, thresholds, members = runtime.predict(TEXTS), runtime.thresholds, runtime.bundle.members
    stats = runtime.stats()
    variant = vary(runtime)
    answers = variant.predict(TEXTS)
    alone = [variant.predict([text])[0] for text in TEXTS[:8]]
    assert len(sessions) == 3, "the variant made none of its own"
    shared = dict(zip([entry.name for entry in runtime.bundle.members], runtime.plan.stages, strict=True))
    assert all(
        stage is shared[entry.name] for entry, stage in zip(variant.bundle.members, variant.plan.stages, strict=True)
    )
    fresh = CascadeRuntime(bundle, **settings)
    assert answers == fresh.predict(TEXTS)
    assert alone == [fresh.predict([text])[0] for text in TEXTS[:8]]
    assert (variant.thresholds, variant.bundle) == (fresh.thresholds, fresh.bundle)
    # The original is as it was.
    assert (runtime.thresholds, runtime.bundle.members) == (thresholds, members)
    assert runtime.stats() == stats
    assert variant.stats().texts == len(TEXTS) + 8, "counts are each runtime's own"
    assert runtime.predict(TEXTS) == before


def test_members_keep_the_thresholds_of_the_runtime(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, thresholds=[0.6, 0.7])
    for names, thresholds in (
        (["tiny", "big"], [0.6]),
        (["small", "big"], [0.7]),
        (["tiny", "small"], [0.6]),
        (["tiny"], []),
        (None, [0.6, 0.7]),
    ):
        assert runtime.with_members(names).thresholds == thresholds


@pytest.mark.parametrize(
    ("vary", "field"),
    [
        (lambda runtime: runtime.with_thresholds(1.5), "thresholds"),
        (lambda runtime: runtime.with_thresholds([0.5]), "thresholds"),
        (lambda runtime: runtime.with_members(["huge"]), "members"),
        (lambda runtime: runtime.with_members([]), "members"),
    ],
)
def test_a_wrong_variant_is_refused(bundle: Path, vary: Callable[[CascadeRuntime], Any], field: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        vary(CascadeRuntime(bundle))
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["thresholds", "bundle", "original", "exit_rule"])
def test_nothing_of_a_runtime_can_be_assigned_to(bundle: Path, name: str) -> None:
    runtime = CascadeRuntime(bundle)
    with pytest.raises(AttributeError):
        setattr(runtime, name, [0.5, 0.5])


def test_changing_the_list_of_thresholds_changes_nothing(bundle: Path) -> None:
    given = [0.6, 0.7]
    runtime = CascadeRuntime(bundle, thresholds=given)
    runtime.thresholds[0] = 0.0
    given[0] = 0.0
    assert runtime.thresholds == [0.6, 0.7]
    assert {answer.exit for answer in runtime.predict(TEXTS)} != {0}


def test_speedups_of_a_variant_are_over_the_biggest_member_that_was_opened(bundle: Path, tuned: Path) -> None:
    for runtime in (CascadeRuntime(bundle), CascadeRuntime(tuned)):
        for names in (["tiny"], ["tiny", "small"], None):
            assert [entry.name for entry in runtime.with_members(names).original] == ["big"]


def test_all_members_of_a_tuned_bundle_are_within_reach(tuned: Path) -> None:
    runtime = CascadeRuntime(tuned)
    assert [entry.name for entry in runtime.bundle.members] == ["tiny", "big"]
    assert [entry.name for entry in runtime.with_members(None).bundle.members] == ["tiny", "small", "big"]


USES: list[Callable[[CascadeRuntime], object]] = [
    lambda runtime: runtime.predict(["a film"]),
    lambda runtime: runtime.predict(TEXTS),
    lambda runtime: runtime.predict([]),
    lambda runtime: runtime.predict_iter(["a film"]),
    lambda runtime: runtime("a film"),
    lambda runtime: runtime.member_logits(["a film"]),
    lambda runtime: runtime.with_thresholds(0.5),
    lambda runtime: runtime.with_members(["tiny"]),
    lambda runtime: runtime.with_trace(None),
    pickle.dumps,
]


@pytest.mark.parametrize("use", USES)
def test_a_closed_runtime_says_so(bundle: Path, use: Callable[[CascadeRuntime], object]) -> None:
    runtime = CascadeRuntime(bundle)
    runtime.close()
    runtime.close()  # once more is no error
    with pytest.raises(CascadeError, match="this runtime is closed; open the bundle again"):
        use(runtime)


def test_a_stream_ends_with_an_error_when_its_runtime_is_closed(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle)
    stream = runtime.predict_iter(TEXTS, chunk_size=2)
    assert [next(stream), next(stream)] == runtime.predict(TEXTS[:2])
    runtime.close()
    with pytest.raises(CascadeError, match="closed"):
        next(stream)


def test_shared_sessions_live_until_the_last_runtime_is_closed(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, preload=True)
    session = weakref.ref(runtime.plan.stages[0].load())
    other = runtime.with_thresholds(0.7)
    answers = other.predict(TEXTS)
    runtime.close()
    gc.collect()
    assert session() is not None
    assert other.predict(TEXTS) == answers
    assert other.with_thresholds(0.7).predict(TEXTS) == answers
    other.close()
    gc.collect()
    assert session() is None


def test_a_with_block_closes(bundle: Path) -> None:
    with CascadeRuntime(bundle) as runtime:
        assert runtime.predict(["a film"])
    with pytest.raises(CascadeError, match="closed"):
        runtime.predict(["a film"])
    with pytest.raises(ZeroDivisionError), CascadeRuntime(bundle) as runtime:
        _ = 1 / 0
    assert "closed" in repr(runtime)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_closing_while_a_call_runs_does_not_break_the_call(bundle: Path, texts: list[str]) -> None:
    """The other thread's call ends as if nothing had happened, or says that the runtime is closed."""
    runtime = CascadeRuntime(bundle, thresholds=0.0, preload=True)
    right = runtime.predict(texts)
    stage, run = runtime.plan.stages[0], runtime.plan.stages[0].run

    def closing(batch: Any) -> Any:
        runtime.close()
        return run(batch)

    stage.run = closing  # type: ignore[method-assign]
    try:
        assert runtime.predict(texts) == right
    except CascadeError as error:
        assert "closed" in str(error)


def test_repr_shows_what_was_opened_and_how_it_runs(bundle: Path, four_segments: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=2, thresholds=[0.6, 0.7])
    shown = repr(runtime)
    for part in (
        str(bundle),
        "tiny (1L fp32)",
        "big (4L fp32)",
        "thresholds=[0.6, 0.7]",
        "provider='cpu'",
        "threads=2",
    ):
        assert part in shown
    assert "closed" not in shown
    assert "small" not in repr(runtime.with_members(["tiny"]))
    assert "patience" in repr(CascadeRuntime(four_segments))
    runtime.close()
    assert "closed" in repr(runtime)


@pytest.fixture(scope="module")
def worker() -> Iterator[Pool]:
    """A process that was spawned, not forked: it has to open the bundle itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def _prepared(bundle: Path, kind: str) -> CascadeRuntime:
    opened = {
        "plain": lambda: CascadeRuntime(bundle),
        "settings": lambda: CascadeRuntime(bundle, threads=1, thresholds=[0.6, 0.9], verify=False),
        "one member": lambda: CascadeRuntime(bundle, members=["small"]),
        "members": lambda: CascadeRuntime(bundle, members=["tiny", "big"], thresholds=0.7),
        "subset": lambda: CascadeRuntime(bundle).with_members(["tiny", "small"]),
        "subset of a subset": lambda: CascadeRuntime(bundle, members=["tiny", "small"]).with_members(["small"]),
        "thresholds": lambda: CascadeRuntime(bundle).with_thresholds([0.4, 0.9]),
        "traced": lambda: CascadeRuntime(bundle, trace=lambda _: None),
        "preloaded": lambda: CascadeRuntime(bundle, preload=True),
    }
    return opened[kind]()


KINDS = [
    "plain",
    "settings",
    "one member",
    "members",
    "subset",
    "subset of a subset",
    "thresholds",
    "traced",
    "preloaded",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_runtime_answers_the_same_in_a_spawned_process(bundle: Path, worker: Pool, kind: str) -> None:
    runtime = _prepared(bundle, kind)
    assert worker.apply(runtime.predict, (TEXTS,)) == runtime.predict(TEXTS)
    same = pickle.loads(pickle.dumps(runtime))
    assert (same.thresholds, same.bundle, list(same.original)) == (
        runtime.thresholds,
        runtime.bundle,
        list(runtime.original),
    )
    assert repr(same) == repr(runtime)
    assert same.stats().texts == 0


def test_a_tuned_runtime_and_its_variants_are_pickled_as_they_are(tuned: Path, worker: Pool) -> None:
    runtime = CascadeRuntime(tuned)
    for variant in (
        runtime,
        runtime.with_thresholds(0.5),
        runtime.with_members(["small"]),
        runtime.with_members(None),
        CascadeRuntime(tuned, thresholds=0.9),
    ):
        assert worker.apply(variant.predict, (TEXTS,)) == variant.predict(TEXTS)
        same = pickle.loads(pickle.dumps(variant))
        assert (same.thresholds, same.bundle) == (variant.thresholds, variant.bundle)
        assert [entry.name for entry in same.original] == ["big"]
        same.predict(TEXTS)
        assert same.stats() == variant.stats(), "what tuning expected is still known"


def test_segments_are_pickled(four_segments: Path, worker: Pool) -> None:
    runtime = CascadeRuntime(four_segments)
    for variant in (runtime, runtime.with_members(["segment-1", "segment-2"]), runtime.with_patience(2)):
        assert worker.apply(variant.predict, (TEXTS,)) == variant.predict(TEXTS)
        same = pickle.loads(pickle.dumps(variant))
        assert same.bundle == variant.bundle
        assert list(same.original) == list(runtime.bundle.members)


def test_a_relative_folder_is_found_from_elsewhere(copied: Path, tmp_path: Path) -> None:
    runtime = CascadeRuntime("copied")
    pickled = pickle.dumps(runtime)
    right = runtime.predict(TEXTS)
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert pickle.loads(pickled).predict(TEXTS) == right


def test_members_of_a_relative_folder_are_loaded_after_a_change_of_folder(copied: Path, tmp_path: Path) -> None:
    runtime = CascadeRuntime("copied")
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert runtime.predict(TEXTS) == CascadeRuntime(copied).predict(TEXTS)


def test_a_bundle_that_was_replaced_is_refused_when_unpickled(copied: Path) -> None:
    pickled = pickle.dumps(CascadeRuntime(copied))
    manifest = copied / "cascade.json"
    original = manifest.read_bytes()
    bundle = read_bundle(copied)
    write_manifest(copied, bundle)  # the same content in another layout, with a seal
    assert pickle.loads(pickled).bundle == bundle
    altered(copied, set_to("note", to="another"))
    with pytest.raises(BundleError, match="replaced since the runtime was pickled; open the bundle again"):
        pickle.loads(pickled)
    manifest.write_bytes(original)
    (copied / "tiny.onnx").write_bytes((copied / "small.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"tiny\.onnx: truncated or altered"):
        pickle.loads(pickled).predict(["a film"])
    shutil.rmtree(copied)
    with pytest.raises(BundleError, match="no bundle there"):
        pickle.loads(pickled)


def test_a_copy_is_a_runtime_of_its_own(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, thresholds=0.7)
    other = copy.deepcopy(runtime)
    runtime.close()
    assert other.predict(TEXTS) == CascadeRuntime(bundle, thresholds=0.7).predict(TEXTS)


def test_eight_threads_answer_as_one(bundle: Path, four_segments: Path, sessions: list[str]) -> None:
    calls = [TEXTS[start : start + size] for start in range(0, 70, 10) for size in (1, 3, 10)] * 3
    for folder in (bundle, four_segments):
        runtime = CascadeRuntime(folder)
        right = [runtime.predict(call) for call in calls]
        sessions.clear()
        shared, barrier = CascadeRuntime(folder), threading.Barrier(8)
        traces: list[Trace] = []
        traced = shared.with_trace(traces.append)

        def work(offset: int, runtime: CascadeRuntime, barrier: threading.Barrier) -> list[Any]:
            barrier.wait()
            return [(index, runtime.predict(calls[index])) for index in range(offset, len(calls), 8)]

        with ThreadPoolExecutor(8) as pool:
            found = dict(pair for part in pool.map(work, range(8), [traced] * 8, [barrier] * 8) for pair in part)
        assert [found[index] for index in range(len(calls))] == right
        assert sorted(sessions) == sorted(entry.file for entry in shared.bundle.members), "each was made once"
        assert sum(trace.texts for trace in traces) == traced.stats().texts == sum(map(len, calls))
        exits = [answer.exit for answers in right for answer in answers]
        assert traced.stats().exits == np.bincount(exits, minlength=len(shared.bundle.members)).tolist()
        assert shared.stats().texts == 0
