"""The journey of many texts through a cluster, on Ray Data.

files -> parts of some thousand records (a task for each file) -> actors, each with a runtime, which answer a part and
write its shard -> receipts in input order.

With member pools, each member has actors of its own: a part goes from pool to pool, with the tokens of the texts that
have not left. Ray Data holds back whoever is ahead, and repeats what was lost with a process or a machine.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..cluster import RemoteBundle, cluster, shared
from ..engine.cpus import usable_threads
from ..engine.execution import Execution
from ..engine.providers import needs_gpu
from ..engine.stage import Stage
from ..engine.step import Journey
from ..errors import CascadeError, InferenceError, InputError, InvalidOption, first_line
from ..io.readers import AS_USUAL, Reading, input_files, read_records
from ..io.remote import is_uri
from ..runtime import CascadeRuntime
from ..types import Text
from .answering import CHUNK, Counts, Lines, Progress, Record, answered, check_on_error, chunks, described
from .shards import ENDINGS, SHARD_ROWS, Receipt, ShardFolder


class Pool(NamedTuple):
    """The actors of one member, or of all."""

    actors: int | None = None
    """None for as many as the cluster has room for."""
    provider: str = "cpu"
    threads: int = 1
    """Threads of each actor, and the CPUs that Ray reserves for it; see `providers.needs_gpu` for those with a GPU."""
    provider_options: Mapping[str, str] | None = None


_POOL = Pool()
_READERS = 2  # files that are read at a time, for each machine


@dataclass(frozen=True)
class JobSettings:
    """The way a job reads, answers and writes."""

    pools: Mapping[str, Pool] | Pool = _POOL
    """The actors that run all members, or a pool for each member by its name."""
    shard_rows: int = SHARD_ROWS
    """Records in each shard."""
    shard_format: str = ENDINGS[0]
    """One of `shards.ENDINGS`."""
    on_error: str = "stop"
    """As for `Lines`."""
    resume: bool = False
    """Go on in the folder of an interrupted run. Shards whose records have changed are written anew."""
    verify: bool = True
    """As for `CascadeRuntime`, where actors open the bundle."""
    reading: Reading = AS_USUAL

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value that is out of range."""
        check_on_error(self.on_error)
        if isinstance(self.shard_rows, bool) or not isinstance(self.shard_rows, int) or self.shard_rows < 1:
            raise InvalidOption("shard_rows", self.shard_rows, "a whole number from 1")


@dataclass(frozen=True)
class _Job:
    """A job, as every process of it knows it."""

    runtime: RemoteBundle
    folder: ShardFolder
    pair: bool
    settings: JobSettings


class _Failure(NamedTuple):
    """Why a part was not answered."""

    error: CascadeError


_Begun = list[tuple[list[Record], Journey]]
_Work = list[Record] | _Begun | Receipt | _Failure


class _Part(NamedTuple):
    """A part in progress; it ends as a receipt."""

    name: str
    digest: str
    work: Any

    def row(self) -> dict[str, list[Any]]:
        """Return it as a batch of one row."""
        return {"part": [pickle.dumps(self)]}

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> _Part:
        """Return it from a batch of one row."""
        found: _Part = pickle.loads(batch["part"][0])
        return found


_USUAL = JobSettings()


def predict_on_cluster(
    runtime: CascadeRuntime,
    source: str,
    output: str,
    counts: Counts,
    settings: JobSettings = _USUAL,
    *,
    address: str | None = None,
    rejects: TextIO | None = None,
    progress: Progress = lambda counts: None,
) -> None:
    """Answer the texts of files on a Ray cluster, write the answers as shards, and count the records.

    Args:
        runtime: What answers; it counts the exits, for `stats`. Its sessions are not used.
        source: A file, a folder or a pattern, or a URI of one; all machines must see it.
        output: The folder of the shards (see `shards`): a path that all machines share, or a URI.
        counts: What was done so far; after each part, in input order.
        settings: The way the job reads, answers and writes.
        address: Of the cluster, as for `cluster.cluster`.
        rejects: Where lines of the records that cannot be used go, in input order.
        progress: Called after each part, with `counts`.

    Raises:
        InputError: The input, the output or a record cannot be used; the shards before it are in the folder.
        CascadeError: An error of a runtime, as of `predict`, or of the cluster.
    """
    folder = ShardFolder(output, settings.shard_format)
    files = [_seen(file) for file in input_files(source)]
    stages = _stages(runtime, settings.pools)
    with cluster(address) as ray:
        _check_room(ray, [pool for _, pool in stages])
        shape = {"shard_rows": settings.shard_rows, "shard_format": settings.shard_format}
        folder.begin(described(runtime, settings.on_error) | shape, resume=settings.resume)
        job = _Job(shared(runtime), folder, runtime.bundle.pair, settings)
        receipts = []
        with closing(_done(job, files, stages)) as done:
            for part in done:
                if isinstance(part.work, _Failure):
                    raise part.work.error
                receipt: Receipt = part.work
                receipts.append(receipt._replace(rejects=""))
                counts.answered += receipt.answered
                counts.rejected += receipt.rejected
                runtime.count(receipt.exits, receipt.layers)
                if rejects is not None:
                    rejects.write(receipt.rejects)
                progress(counts)
        stats = runtime.stats()
        summary = {"answered": counts.answered, "rejected": counts.rejected, "exits": stats.exits}
        folder.finish(receipts, summary | {"distance": stats.distance, "p_value": stats.p_value})


def _seen(file: str | Path) -> str:
    """Return the URI or absolute path of a file; raise InputError where there is none."""
    if is_uri(file):
        return str(file)
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file; check the path")
    return str(Path(file).absolute())


def _stages(runtime: CascadeRuntime, pools: Mapping[str, Pool] | Pool) -> list[tuple[range, Pool]]:
    """Return which members each pool runs, by their positions."""
    names = [member.name for member in runtime.bundle.members]
    for pool in [pools] if isinstance(pools, Pool) else pools.values():
        if pool.actors is not None and pool.actors < 1:
            raise InvalidOption("actors", pool.actors, "a whole number from 1")
        usable_threads(pool.threads)
        needs_gpu(pool.provider)  # raises the error of an unknown one
    if isinstance(pools, Pool):
        return [(range(len(names)), pools)]
    if set(pools) != set(names):
        raise InvalidOption("pools", ", ".join(pools), f"each member once: {', '.join(names)}")
    return [(range(at, at + 1), pools[name]) for at, name in enumerate(names)]


def _check_room(ray: Any, pools: Sequence[Pool]) -> None:
    """Raise InvalidOption for actors that a cluster of one machine has no room for; others may grow."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(machines) > 1:
        return
    cpus, gpus = (int(machines[0].get(kind, 0)) for kind in ("CPU", "GPU"))
    for pool in pools:
        needed = _resources(pool)
        if needed.get("num_cpus", 0) > cpus:
            raise InvalidOption("threads", pool.threads, f"at most {cpus}, the CPUs of the cluster's only machine")
        if needed.get("num_gpus", 0) > gpus:
            raise InvalidOption("provider", pool.provider, "cpu: Ray knows no GPU on the cluster's only machine")


def _done(job: _Job, files: Sequence[str], stages: Sequence[tuple[range, Pool]]) -> Generator[_Part, None, None]:
    """Run the job, and yield its parts in input order."""
    import ray  # noqa: PLC0415 - an extra
    import ray.data  # noqa: PLC0415

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # each part is a block of its own, to be worked on by itself
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        readers = min(len(files), _READERS * len(ray.nodes()))
        items = [{"at": at, "file": file} for at, file in enumerate(files)]
        parts = ray.data.from_items(items, override_num_blocks=len(files)).map_batches(
            _Reader(job), batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(readers)
        )
        for members, pool in stages:
            parts = parts.map_batches(
                _Answerer,
                fn_constructor_args=(job, members, pool),
                batch_size=1,
                # Idle actors may end, to make room for those that a dead machine leaves behind.
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool.actors, initial_size=pool.actors),
                **_resources(pool),
            )
        try:
            for row in parts.iter_rows():
                part: _Part = pickle.loads(row["part"])
                yield part
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise CascadeError(f"the cluster failed ({first_line(cause)}); resume the job") from error


def _resources(pool: Pool) -> dict[str, int]:
    """Return what Ray reserves for an actor."""
    return {"num_gpus": 1} if needs_gpu(pool.provider) else {"num_cpus": pool.threads}


class _Reader:
    """Reads files, and cuts their records into parts."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        job, at, file = self._job, int(batch["at"][0]), str(batch["file"][0])
        number = 0
        try:
            records = read_records(file, job.settings.reading, pair=job.pair)
            for number, some in enumerate(chunks(records, job.settings.shard_rows), 1):
                yield self._part(f"{at:05d}-{number - 1:06d}", some).row()
        except CascadeError as error:
            yield _Part(f"{at:05d}-{number:06d}", "", _Failure(error)).row()

    def _part(self, name: str, records: list[Record]) -> _Part:
        digest = hashlib.blake2b(digest_size=16)
        for record in records:
            digest.update(record.content)
        found = digest.hexdigest()
        receipt = self._job.folder.receipt(name, found) if self._job.settings.resume else None
        return _Part(name, found, records if receipt is None else receipt)


class _Answerer:
    """An actor: runs one member or all on parts, and writes the shard after the last."""

    def __init__(self, job: _Job, members: range, pool: Pool) -> None:
        self._job = job
        self._members = members
        self._error: CascadeError | None = None
        try:
            self._runtime, self._stages, self._own = _opened(job, members, pool)
        except CascadeError as error:  # else Ray would start the actor again and again
            self._error = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        part = _Part.of(batch)
        if isinstance(part.work, Receipt | _Failure):
            return part.row()
        try:
            if self._error is not None:
                raise self._error
            return part._replace(work=self._advanced(part)).row()
        except CascadeError as error:
            return part._replace(work=_Failure(error)).row()

    def _advanced(self, part: _Part) -> _Begun | Receipt:
        runtime = self._runtime
        begun: _Begun = []
        for records, journey in part.work if self._members.start else self._begun(part.work):
            try:
                begun.append((records, self._run(journey, self._members)))
            except InferenceError:  # from the start, to find the texts at fault
                begun += answered(records, self._own, self._begin)
        return self._written(part, begun) if self._members.stop == len(runtime.bundle.members) else begun

    def _begun(self, records: list[Record]) -> Iterator[tuple[list[Record], Journey]]:
        for some in chunks(records, CHUNK):
            yield from answered(some, self._own, self._runtime.begin)

    def _begin(self, texts: list[Text]) -> Journey:
        return self._run(self._runtime.begin(texts), range(self._members.stop))

    def _run(self, journey: Journey, members: range) -> Journey:
        for member in members:
            self._runtime.advance(journey, member, self._stages.get(member))
        return journey

    def _written(self, part: _Part, begun: _Begun) -> Receipt:
        output, rejects = io.StringIO(), io.StringIO()
        lines = Lines(output, rejects, self._job.settings.on_error)
        self._runtime.stats(reset=True)
        layers = 0
        for records, journey in begun:
            predictions = self._runtime.finish(journey)
            layers += sum(prediction.layers for prediction in predictions)
            lines.write(records, predictions, self._runtime.task)
        counts, exits = lines.counts, self._runtime.stats().exits
        executed = None if self._runtime.plan.windows is None else layers

        def receipt(size: int) -> Receipt:
            done = counts.answered, counts.rejected, exits, rejects.getvalue()
            return Receipt(part.name, part.digest, size, *done, layers=executed)

        return self._job.folder.write(part.name, output.getvalue(), receipt)


def _opened(job: _Job, members: range, pool: Pool) -> tuple[CascadeRuntime, Mapping[int, Stage], CascadeRuntime]:
    """Return the runtime, what runs some of its members, by their positions, and a runtime that runs these so.

    Another provider opens those members alone: it may have no kernels for the precision of the others.
    """
    whole = job.runtime
    execution = Execution(pool.provider, pool.threads, pool.provider_options)
    if pool.provider == "cpu" or len(members) == len(whole.members):
        runtime = whole.open(execution, verify=job.settings.verify)
        return runtime, dict(enumerate(runtime.plan.stages)), runtime
    own = whole.open(execution, verify=job.settings.verify, members=[whole.members[member] for member in members])
    runtime = whole.open(Execution(threads=pool.threads), verify=job.settings.verify)
    return runtime, dict(zip(members, own.plan.stages, strict=True)), own
