"""SELECT: metadata rows -> rows worth downloading, shuffled, in exact shards."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from filters.recipe import Recipe
from filters.rules import RuleValue, in_words
from filters.select.lists import WHICH_UID
from filters.select.metadata_files import metadata_of, num_rows_of, remarks_on
from filters.select.needs import open_files
from filters.select.row_filter import Source, open_passing_rows
from filters.select.schema import MetadataFile
from filters.select.shard_writer import ExactShards, SelectedUids
from filters.select.shuffle import Order, Shuffle, SourceOrder
from filters.select.side_inputs import identify_side_inputs
from filters.select_config import SelectConfig
from sdtrain.dataset.files import numbered_files, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, entries, forget_entry, shard_of
from sdtrain.dataset.removal_ledger import REMOVED, read_ledger
from sdtrain.dataset.rewriting import IN_TABLE, Rewriting
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Drops, Needs, Stage, Table, always_on, no_openers
from sdtrain.dataset.tables.carried import mark_carried
from sdtrain.dataset.work import WORK
from sdtrain.download.source.catalogue import catalogue_files, last_source_row, read_remarks
from sdtrain.errors import UserError

_ROWS_PER_BUCKET = 2**16  # about 15 MB
_SIDE_INPUTS = ("joins", "blocklists", "allowlists")  # identified by their contents, not their location
_ADDED = (
    "columns",
    "carry",
)  # settings younger than finished datasets, whose fingerprint they do not change unless set
_MAX_BUCKETS = 512  # each is an open file, and a process may have 1,024


@dataclass(frozen=True)
class Before:
    """Earlier selections of other files, left unchanged; their rows are not selected again.

    `files` are the shards of each selection, with `num_rows` rows together.
    """

    number: int = 0
    files: Sequence[Sequence[Path]] = ()
    num_rows: int = 0

    @property
    def num_shards(self) -> int:
        """The next shard's number."""
        return sum(len(files) for files in self.files)


@dataclass(frozen=True)
class Selection:
    """One run of the selection over some files."""

    dataset: DatasetDir
    select: SelectConfig
    files: Sequence[MetadataFile]
    allow_private_hosts: bool = False
    before: Before = Before()
    is_import: bool = False
    num_threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    def run(self) -> ShardReport:
        """Writes the shards, byte-identical for any number of threads.

        A row without a caption stays, with an empty one, as in img2dataset; `min_caption_chars` drops it. UserError if
        the metadata cannot be read, lacks a column, or no row passes.
        """
        with scratch(self.dataset.root, "select") as folder:
            removed = read_ledger(self.dataset.removed)
            private, num_threads = self.allow_private_hosts, self.num_threads
            source = Source(self.files, self.select, folder, private, num_threads, removed, self.is_import)
            with open_passing_rows(source) as passing:
                num_passed, dropped = passing.count()
                num_in = num_passed + dropped.total()
                num_buckets = min(_MAX_BUCKETS, 1 + num_passed // _ROWS_PER_BUCKET)
                shuffle = Shuffle(folder, num_buckets, self._order)
                late = passing.each(shuffle.add)
                remarks = passing.side_inputs.remarks if passing.side_inputs else ()
            paths, num_out, repeated = self._write(shuffle)
        _delete_from(self.dataset, self.before.num_shards + len(paths))
        dropped += late + repeated
        self._check_sum(num_in, num_out, dropped)
        return ShardReport(
            stage="select",
            shard=self.before.number,
            num_in=num_out + sum(dropped.values()),
            num_out=num_out,
            dropped=dict(sorted(dropped.items())),
            outputs=describe_outputs(self.dataset, paths),
            inputs=[_named(file) for file in self.files],
            notes=[*(_import_remarks(self.files) if self.is_import else remarks_on(self.files, self.select)), *remarks],
        )

    def _write(self, shuffle: Shuffle) -> tuple[list[Path], int, Counter[str]]:
        """Writes the shards; returns them, their number of rows, and drop counts by reason."""
        limit = max(0, (self.select.limit or math.inf) - self.before.num_rows)
        # An import lists only what is new, and finished ones are in another order.
        selected = SelectedUids(() if self.is_import else self.before.files, self._order)
        num_out = num_repeated = num_over = 0
        # Two more than there are processors, because each thread ends by waiting for the disk.
        with ThreadPoolExecutor(self.num_threads + 2) as threads:
            shards = ExactShards(self.dataset, self.select.samples_per_shard, self.before.num_shards, threads)
            for bucket in shuffle.buckets(threads, self.num_threads, selected.are_selected):
                left = int(min(len(bucket.rows), limit - num_out))
                # Rows up to the last one taken may repeat; all after it are over the limit.
                num_seen = int(bucket.positions[left]) if left < len(bucket.rows) else bucket.num_before
                num_repeated, num_over = num_repeated + num_seen - left, num_over + bucket.num_before - num_seen
                num_out += left
                shards.add(mark_carried(bucket.rows.slice(0, left), self.select.carry))
            paths = shards.finish()
        return paths, num_out, +Counter({"duplicate_row": num_repeated, "over_limit": num_over})

    @property
    def _order(self) -> Order:
        if self.is_import:
            last_row = max(last_source_row(Path(file.path)) for file in self.files)
            return SourceOrder(self.select.seed, last_row=last_row)
        return Order(self.select.seed, self.select.shuffle_by)

    def _uid_hint(self, dropped: Counter[str]) -> str:
        """Tells which uid an allowlist by uid means, if such a one dropped rows."""
        if not dropped["not_allowlisted"] or all(config.by != "uid" for config in self.select.allowlists):
            return ""
        has_own = any("uid" in map(str.lower, file.all_columns) for file in self.files)
        own = " or the metadata's own column uid" if has_own else "; the metadata has no column uid of its own"
        return f" A uid in an allowlist is {WHICH_UID}{own}."

    def _check_sum(self, num_counted: int, num_out: int, dropped: Counter[str]) -> None:
        num_rows = num_rows_of(self.files)
        num_in = num_counted if num_rows is None else num_rows
        if num_in != num_out + dropped.total():
            raise UserError(
                f"The metadata in {self.select.metadata} changed while it was read: {num_in:,} rows at first, "
                f"{num_out + dropped.total():,} were seen. Run the same command again."
            )
        if not num_in:
            raise UserError(
                f"The metadata in {self.select.metadata} has no rows ({len(self.files)} file(s), all empty)."
            )
        if not num_out and not self.before.number:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
            raise UserError(
                f"No row of {self.select.metadata} is left ({counts}). Loosen the rules, or check the metadata."
                f"{self._uid_hint(dropped)}"
            )


def select_rows(
    dataset: DatasetDir, select: SelectConfig, allow_private_hosts: bool = False, num_threads: int | None = None
) -> ShardReport:
    """Writes the selection `select` into a dataset that has none; see `Selection.run`."""
    files = metadata_of(select)
    num_threads = num_threads or len(os.sched_getaffinity(0))
    return Selection(dataset, select, files, allow_private_hosts, num_threads=num_threads).run()


def _import_remarks(files: Sequence[MetadataFile]) -> list[str]:
    return [remark for file in files for remark in read_remarks(Path(file.path))]


def _catalogue(dataset: DatasetDir, shard: int) -> list[Path]:
    return catalogue_files(dataset.catalogues)


def _named(file: MetadataFile) -> str:
    return " ".join(map(str, file.identity))


def _generations(dataset: DatasetDir, recipe: Recipe) -> list[list[MetadataFile]]:
    """Returns the files of each selection: finished ones unchanged, remaining files in one more.

    If a finished one no longer fits (its recipe or one of its files changed), returns one selection of everything.
    """
    files = metadata_of(recipe.select)
    left = {_named(file): file for file in files}
    if len(left) < len(files) or recipe.select.new_files == "reshuffle":
        return [files]
    generations = []
    for number, entry in enumerate(entries(dataset, "select")):
        fits = entry.shard == number and entry.fingerprint == _digest(recipe, entry.inputs)
        if not fits or not left.keys() >= set(entry.inputs):
            return [files]
        generations.append([left.pop(name) for name in entry.inputs])
    return [*generations, list(left.values())] if left else generations


def _digest(recipe: Recipe, inputs: Sequence[str]) -> str:
    unset = {name for name in _ADDED if not getattr(recipe.select, name)}
    config = recipe.select.model_dump(mode="json", exclude={"metadata", "rules", "new_files", *_SIDE_INPUTS, *unset})
    if config["shuffle_by"] == "uid":  # as it was before there was a choice
        del config["shuffle_by"]
    # As pairs, because the order of the rules decides the reasons.
    config |= {"rules": list(recipe.select.rules.items()), "private": recipe.download.allow_private_hosts}
    if recipe.source:
        config["order"] = "source"
    return fingerprint("select/2", config | {"files": sorted(inputs), "extras": identify_side_inputs(recipe.select)})


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(range(len(_generations(dataset, recipe))))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    return _digest(recipe, [_named(file) for file in _generations(dataset, recipe)[shard]])


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    generations = _generations(dataset, recipe)
    for number in shards:
        # Selections being replaced must not look finished if this run is interrupted.
        for entry in entries(dataset, "select"):
            if entry.shard >= number:
                forget_entry(dataset, "select", entry.shard)
        before = _before(dataset, number)
        allow_private = recipe.download.allow_private_hosts
        is_import = recipe.source is not None
        yield Selection(dataset, recipe.select, generations[number], allow_private, before, is_import).run()


def _before(dataset: DatasetDir, number: int) -> Before:
    reports = entries(dataset, "select")[:number]
    files = [[dataset.selection(shard) for shard in sorted(map(shard_of, report.outputs))] for report in reports]
    return Before(number, files, sum(report.num_out for report in reports))


def _delete_from(dataset: DatasetDir, shard: int) -> None:
    for number, path in numbered_files(dataset.selection(0).parent, ".parquet").items():
        if number >= shard:
            path.unlink()


def _num_shards(dataset: DatasetDir, recipe: Recipe) -> int:
    return max(1, len(entries(dataset, "select")))


def _rules(recipe: Recipe) -> dict[str, RuleValue]:
    return recipe.select.rules


def _recount(dataset: DatasetDir, entry: ShardReport, tables: Sequence[Path]) -> ShardReport | None:
    paths = [dataset.root / name for name in entry.outputs]
    if not all(path.exists() for path in paths):
        return None
    left, dropped = sum(pq.read_metadata(path).num_rows for path in paths), Counter(entry.dropped)
    dropped[REMOVED] += entry.num_out - left
    outputs = entry.outputs | describe_outputs(dataset, tables)
    counts = {"num_out": left, "dropped": dict(sorted((+dropped).items()))}
    return entry.model_copy(update=counts | {"outputs": outputs})


SELECT: Stage[Recipe] = Stage(
    *("select", _shards, _fingerprint, _run),
    is_on=always_on,
    inputs={"select": "all shards"},
    planned_by=None,
    num_shards=_num_shards,
    beside=_catalogue,
    table=Table(
        view="selection",
        comment="Rows chosen from the metadata, in download order",
        columns={
            **dict.fromkeys(("key", "uid", "url", "caption"), "VARCHAR"),
            **dict.fromkeys(("width", "height"), "INTEGER"),
            "similarity": "DOUBLE",
            "hash": "BIGINT",
            **dict.fromkeys(("pwatermark", "punsafe", "aesthetic", "aesthetic_v1"), "DOUBLE"),
            "shard": "INTEGER",
        },
        path=DatasetDir.selection,
        rewriting=Rewriting(origins={}, has_tar=False, drop=IN_TABLE.drop, recount=_recount),
    ),
    drops=Drops(
        repeats=False,
        rules=_rules,
        last={
            "url_missing": "no URL",
            "url_not_allowed": "not a plain http or https URL of a public host",
            "blocklisted": "on one of the recipe's blocklists",
            "not_allowlisted": "not on one of the recipe's allowlists",
            REMOVED: "taken out of this dataset for good",
            "duplicate_row": "the same URL and caption again",
            "over_limit": "over the recipe's limit",
        },
        explain=in_words,
    ),
    uses_gpu=False,
    needs=Needs(files=open_files, networks=no_openers, sized=no_openers),
    work=WORK["select"],
)
