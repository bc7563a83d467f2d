"""Runs a stage, one small function over one shard, over the unfinished shards."""

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

from sdtrain.dataset.files import numbered_files, sweep
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import bulk_reads, entries, forget_entry, is_whole, read_entry, write_entry
from sdtrain.dataset.manifest_table import StageEntries
from sdtrain.dataset.rewriting import RecipeT, Rewriting
from sdtrain.dataset.s3.lock import with_lock_token
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.storage import storage_of
from sdtrain.dataset.sync import Part, evict_after, fetch_inputs, fetch_outputs
from sdtrain.dataset.work import Work


@dataclass(frozen=True, kw_only=True)
class Table(Generic[RecipeT]):
    """A stage's table: Parquet with one row per sample and a column `uid`.

    Attributes:
        view: its name in metadata.duckdb.
        comment: the meaning of a row, for users of the view.
        columns: name -> type in DuckDB, in order; shown if there is no file, or one that lacks them.
        path: of a shard's file; one file may serve all shards.
        rewriting: how removed samples leave it, and a tar beside it.
    """

    view: str
    comment: str
    columns: Mapping[str, str]
    path: Callable[[DatasetDir, int], Path]
    rewriting: Rewriting[RecipeT]

    def files(self, dataset: DatasetDir) -> dict[int, Path]:
        """Shard -> file, for the files on disk, whether or not the manifest lists them."""
        first = self.path(dataset, 0)
        if first == self.path(dataset, 1):
            return {0: first} if first.exists() else {}
        return numbered_files(first.parent, ".parquet")


@dataclass(frozen=True, kw_only=True)
class Drops(Generic[RecipeT]):
    """Explains for the funnel why a stage drops samples.

    Attributes:
        repeats: its reports also count selected rows that earlier stages dropped.
        rules: the recipe's rules that it applies, in order.
        last: reasons checked after the rules, in order, in plain words.
        explain: describes any other reason.
    """

    repeats: bool
    rules: Callable[[RecipeT], Mapping[str, Any]]
    last: Mapping[str, str]
    explain: Callable[[str], str]


Openers = dict[str, Callable[[], str]]
"""By setting: opens it as the stage will, and describes what it found; UserError if the stage would fail."""


def no_openers(recipe: object, num_rows: int = 0) -> Openers:
    """For a stage that opens nothing named by the recipe."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Needs(Generic[RecipeT]):
    """Checks before a build begins, so that hours of work do not end at a mistyped name.

    Attributes:
        files: on this machine, or listed in a moment.
        networks: whose published weights are fetched if they are not here.
        sized: those that depend on the number of selected rows, the second argument.
    """

    files: Callable[[RecipeT], Openers]
    networks: Callable[[RecipeT], Openers]
    sized: Callable[[RecipeT, int], Openers]


NOTHING: Needs[object] = Needs(files=no_openers, networks=no_openers, sized=no_openers)


@dataclass(frozen=True)
class Stage(Generic[RecipeT]):
    """One step of the pipeline, with all that other code must know about it: nothing has a default.

    Attributes:
        name: its name in manifests, logs and on the command line.
        shards: the shards to do, once the previous stage has finished.
        fingerprint: digest of all that determines a shard's bytes (`manifest.fingerprint`).
        run: processes some shards, yielding a report for each once its outputs have their final names.
        is_on: whether a recipe asks for it; nothing shows a stage that is off.
        inputs: the stages it reads -> which of their shards.
        planned_by: the stage whose outputs `shards` reads; None if the manifest is enough.
        num_shards: the number of shards, from the manifest alone; None until an earlier stage decides it.
        beside: files that a shard's outputs need and its report does not list.
        table: its table of samples; None if it writes none.
        drops: None if it loses no sample.
        uses_gpu: whether it uses a GPU if there is one.
        needs: what it opens beside the outputs of other stages.
        work: for plans; None if its rates are not known: plans say that they leave it out.
    """

    name: str
    shards: Callable[[DatasetDir, RecipeT], list[int]]
    fingerprint: Callable[[DatasetDir, RecipeT, int], str]
    run: Callable[[DatasetDir, RecipeT, Sequence[int]], Iterator[ShardReport]]
    _: KW_ONLY
    is_on: Callable[[RecipeT], bool]
    inputs: Mapping[str, Part]
    planned_by: str | None
    num_shards: Callable[[DatasetDir, RecipeT], int | None]
    beside: Callable[[DatasetDir, int], list[Path]]
    table: Table[RecipeT] | None
    drops: Drops[RecipeT] | None
    uses_gpu: bool
    needs: Needs[RecipeT]
    work: Work | None

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickles a declared stage by its name, as its fields are many."""
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
    """Work in shards outside the pipeline, which reads no other stage and writes no table of samples."""
    return Stage(
        *(name, shards, fingerprint, run),
        is_on=always_on,
        inputs={},
        planned_by=None,
        num_shards=unknown_number,
        beside=nothing_beside,
        table=None,
        drops=None,
        uses_gpu=uses_gpu,
        needs=NOTHING,
        work=None,
    )


def always_on(recipe: object) -> bool:
    """For a stage of every recipe."""
    return True


def unknown_number(dataset: DatasetDir, recipe: object) -> None:
    """The number of shards of a stage outside the pipeline."""


def one_shard(dataset: DatasetDir, recipe: object) -> int:
    """The number of shards of a stage that needs all samples at once."""
    return 1


def nothing_beside(dataset: DatasetDir, shard: int) -> list[Path]:
    """For a stage whose reports list all of its files."""
    return []


def _declared(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def pending(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT) -> list[int]:
    """Shards without finished output of this very configuration; none of a stage that is off."""
    if not stage.is_on(recipe):
        return []
    shards = stage.shards(dataset, recipe)
    with bulk_reads():
        return [shard for shard in shards if not is_finished(stage, dataset, recipe, shard)]


def is_finished(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT, shard: int) -> bool:
    """Whether the shard was made from the same input and configuration and is still whole."""
    entry = read_entry(dataset, stage.name, shard)
    if entry is None or not is_whole(dataset, entry):
        return False
    return entry.fingerprint == stage.fingerprint(dataset, recipe, shard)


def current_entries(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT) -> StageEntries:
    """The entries of a stage's finished shards, without what an earlier, larger selection has left."""
    return entries(dataset, stage.name).below(stage.num_shards(dataset, recipe) or 0)


def run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None] = lambda report: None,
    lock_token: str = "",
) -> list[ShardReport]:
    """Runs the stage over `shards` and records each as finished, the entry written last.

    `recipe` is the input of the stage's functions; `on_report` is called for each recorded shard. `lock_token` is
    `lock_token_of` of the process that has locked the dataset, if it is another one.
    """
    with with_lock_token(lock_token):
        return _run_batch(stage, dataset, recipe, shards, on_report)


def lock_token_of(dataset: DatasetDir) -> str:
    """The token that this process gives to others that write for it; empty for a local dataset."""
    return storage_of(dataset).lock_token


def _run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None],
) -> list[ShardReport]:
    for shard in shards:
        # Output about to be overwritten must not look finished if this run is killed.
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
    """Records a shard as finished, once its outputs have their final names."""
    write_entry(dataset, report, stage.beside(dataset, report.shard))


def release(stage: Stage[Any], dataset: DatasetDir, report: ShardReport) -> None:
    """Evicts the large files of a recorded shard, and those that only it reads."""
    evict_after(dataset, report, [name for name, part in stage.inputs.items() if part == "same shard"])


def begin(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Prepares for inspecting a stage's shards: syncs other machines' work and clears leftovers."""
    storage_of(dataset).sync(may_delete=False)
    if stage.planned_by:
        fetch_outputs(dataset, stage.planned_by)
    clear_leftovers(stage, dataset)


def clear_leftovers(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Deletes the temporary files of this stage's killed runs."""
    for directory in (dataset.root, *(p for p in dataset.root.glob("*") if p.is_dir())):
        sweep(directory)
    sweep(dataset.manifest_entry(stage.name, 0).parent)


class _Recorder:
    """Records shards as finished; uploads to S3 run in the background, one at a time.

    `reports` are of the recorded shards; `on_report` is called for each, in the reporting thread.
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
                self._thread.shutdown()  # also after an error: finished work is recorded

    def add(self, report: ShardReport) -> None:
        """Records a shard whose outputs have their final names.

        UserError if it, or the one before, cannot be written.
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
        """Waits for the shard being written, if any."""
        if waiting:
            report, upload = waiting
            upload.result()
            self._tell(report)

    def _tell(self, report: ShardReport) -> None:
        self.reports.append(report)
        self._on_report(report)
