"""A stage is one small function over one shard; this runs it over the shards that are not finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Generic

from sdtrain.dataset.files import sweep
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import forget_entry, is_whole, read_entry, write_entry
from sdtrain.dataset.rewriting import RecipeT, Rewriting
from sdtrain.dataset.s3.lock import with_lock_token
from sdtrain.dataset.s3.sync import Part, evict_after, fetch_inputs, fetch_outputs
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.storage import storage_of


@dataclass(frozen=True, kw_only=True)
class Table(Generic[RecipeT]):
    """The table of a stage: Parquet with one row a sample and a column `uid`.

    Attributes:
        view: its name in metadata.duckdb.
        comment: what a row is, for those who ask the view.
        columns: name -> type in DuckDB, in order; shown while there is no file, or one that lacks them.
        path: of a shard's file; the same for all shards where there is one file.
        rewriting: how removed samples leave it, and a tar beside it.
    """

    view: str
    comment: str
    columns: Mapping[str, str]
    path: Callable[[DatasetDir, int], Path]
    rewriting: Rewriting[RecipeT]

    def files(self, dataset: DatasetDir) -> dict[int, Path]:
        """Shard -> file, for those that lie there, whether the manifest knows them or not."""
        first = self.path(dataset, 0)
        if first == self.path(dataset, 1):
            return {0: first} if first.exists() else {}
        return {int(path.stem): path for path in sorted(first.parent.glob("[0-9]*.parquet"))}


@dataclass(frozen=True, kw_only=True)
class Drops(Generic[RecipeT]):
    """Why a stage drops samples, as the funnel tells it.

    Attributes:
        repeats: its reports count all selected rows, those included that the stages before it dropped.
        rules: the recipe's rules that it asks, in their order.
        last: reasons that are looked for after the rules, in their order, in plain words.
        explain: any other reason in plain words.
    """

    repeats: bool
    rules: Callable[[RecipeT], Mapping[str, Any]]
    last: Mapping[str, str]
    explain: Callable[[str], str]


@dataclass(frozen=True)
class Stage(Generic[RecipeT]):
    """One step of the pipeline, and all that other code must know of it: nothing has a default.

    Attributes:
        name: its name in manifests, logs and on the command line.
        shards: which shards there are to do, once the stage before has finished.
        fingerprint: digest of all that decides a shard's bytes (`manifest.fingerprint`).
        run: does some shards, yielding a report for each once its outputs have their final names.
        inputs: the stages whose outputs it reads -> which of their shards.
        planned_by: the stage whose outputs `shards` reads; None if the manifest is enough.
        num_shards: how many shards there are, by the manifest alone; None while an earlier stage decides that.
        beside: files that a shard's outputs need and its report does not list.
        table: the table that names its samples; None if it writes none.
        drops: None if no sample is lost in it.
        uses_gpu: it computes on a GPU where there is one.
    """

    name: str
    shards: Callable[[DatasetDir, RecipeT], list[int]]
    fingerprint: Callable[[DatasetDir, RecipeT, int], str]
    run: Callable[[DatasetDir, RecipeT, Sequence[int]], Iterator[ShardReport]]
    _: KW_ONLY
    inputs: Mapping[str, Part]
    planned_by: str | None
    num_shards: Callable[[DatasetDir, RecipeT], int | None]
    beside: Callable[[DatasetDir, int], list[Path]]
    table: Table[RecipeT] | None
    drops: Drops[RecipeT] | None
    uses_gpu: bool

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Goes to workers by the name of its declaration where it has one, because its facts are many."""
        module = self.run.__module__
        for name, value in vars(sys.modules[module]).items():
            if value is self:
                return _declared, (module, name)
        return super().__reduce__()


def plain_stage(
    name: str,
    shards: Callable[[DatasetDir, RecipeT], list[int]],
    fingerprint: Callable[[DatasetDir, RecipeT, int], str],
    run: Callable[[DatasetDir, RecipeT, Sequence[int]], Iterator[ShardReport]],
    uses_gpu: bool = False,
) -> Stage[RecipeT]:
    """Work in shards outside the pipeline: it reads nothing of other stages and writes no table of samples."""
    return Stage(
        *(name, shards, fingerprint, run),
        inputs={},
        planned_by=None,
        num_shards=unknown_number,
        beside=nothing_beside,
        table=None,
        drops=None,
        uses_gpu=uses_gpu,
    )


def unknown_number(dataset: DatasetDir, recipe: object) -> None:
    """The number of shards of a stage that has no place in the pipeline."""


def one_shard(dataset: DatasetDir, recipe: object) -> int:
    """The number of shards of a stage that needs all samples at once."""
    return 1


def nothing_beside(dataset: DatasetDir, shard: int) -> list[Path]:
    """For a stage whose reports list all of its files."""
    return []


def _declared(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def pending(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT) -> list[int]:
    """Shards that have no finished output of this very configuration."""
    return [shard for shard in stage.shards(dataset, recipe) if not is_finished(stage, dataset, recipe, shard)]


def is_finished(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT, shard: int) -> bool:
    """Whether the shard was made from the same input and configuration and is still whole."""
    entry = read_entry(dataset, stage.name, shard)
    if entry is None or not is_whole(dataset, entry):
        return False
    return entry.fingerprint == stage.fingerprint(dataset, recipe, shard)


def run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None] = lambda report: None,
    lock_token: str = "",
) -> list[ShardReport]:
    """Runs the stage over `shards` and records each as finished, the entry written last.

    Args:
        stage: what is done.
        dataset: whose shards.
        recipe: what the stage's functions take.
        shards: their numbers.
        on_report: called for each that is recorded.
        lock_token: what `lock_token_of` gives in the process that has locked the dataset, where this is another one.
    """
    with with_lock_token(lock_token):
        return _run_batch(stage, dataset, recipe, shards, on_report)


def lock_token_of(dataset: DatasetDir) -> str:
    """What this process gives to others that are to write for it; empty for a dataset that lies on disk alone."""
    return storage_of(dataset).lock_token


def _run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None],
) -> list[ShardReport]:
    for shard in shards:
        # What is about to be overwritten must not look finished if this run is killed.
        forget_entry(dataset, stage.name, shard)
    started = time.monotonic()
    fetch_inputs(dataset, stage.inputs, shards)
    with _Recorder(stage, dataset, on_report) as recorder:
        for report in stage.run(dataset, recipe, shards):
            now = time.monotonic()
            digest = stage.fingerprint(dataset, recipe, report.shard)
            times = {"seconds": round(now - started, 3), "finished_at": round(time.time(), 3)}
            recorder.add(report.model_copy(update={"fingerprint": digest} | times))
            started = now
    return recorder.reports


def record(stage: Stage[Any], dataset: DatasetDir, report: ShardReport) -> None:
    """Makes a shard count as finished; its outputs have their final names."""
    write_entry(dataset, report, stage.beside(dataset, report.shard))


def release(stage: Stage[Any], dataset: DatasetDir, report: ShardReport) -> None:
    """Lets the large files of a recorded shard leave the work folder, and those that only it reads."""
    evict_after(dataset, report, [name for name, part in stage.inputs.items() if part == "same shard"])


def begin(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Before a stage's shards are looked at: what other machines finished is known here, and nothing half-done lies."""
    storage_of(dataset).sync(may_delete=False)
    if stage.planned_by:
        fetch_outputs(dataset, stage.planned_by)
    clear_leftovers(stage, dataset)


def clear_leftovers(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Deletes what killed runs of this stage left under temporary names."""
    for directory in (dataset.root, *(p for p in dataset.root.glob("*") if p.is_dir())):
        sweep(directory)
    sweep(dataset.manifest_entry(stage.name, 0).parent)


class _Recorder:
    """Makes shards count as finished; their upload to S3 goes on beside the work, one at a time.

    Attributes:
        reports: of the shards that are recorded.

    Args:
        stage: whose shards.
        dataset: where they lie.
        on_report: called for each of them, in the thread that reports.
    """

    def __init__(self, stage: Stage[Any], dataset: DatasetDir, on_report: Callable[[ShardReport], None]) -> None:
        self.reports: list[ShardReport] = []
        self._stage, self._dataset, self._on_report = stage, dataset, on_report
        self._thread = ThreadPoolExecutor(1, "upload") if storage_of(dataset).is_remote else None
        self._waiting: tuple[ShardReport, Future[None]] | None = None

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._end(self._waiting)
        finally:
            if self._thread:
                self._thread.shutdown()  # after an error too, what is finished is recorded

    def add(self, report: ShardReport) -> None:
        """Records a shard whose outputs have their final names.

        Raises:
            UserError: it, or the one before, cannot be written.
        """
        if self._thread is None:
            record(self._stage, self._dataset, report)
            self._tell(report)
            return
        before = self._waiting
        self._waiting = report, self._thread.submit(copy_context().run, self._upload, report)
        self._end(before)

    def _upload(self, report: ShardReport) -> None:
        record(self._stage, self._dataset, report)
        release(self._stage, self._dataset, report)

    def _end(self, waiting: tuple[ShardReport, Future[None]] | None) -> None:
        """Waits for a shard that is being written, if there is one."""
        if waiting:
            report, upload = waiting
            upload.result()
            self._tell(report)

    def _tell(self, report: ShardReport) -> None:
        self.reports.append(report)
        self._on_report(report)
