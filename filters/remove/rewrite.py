"""Rewriting of each stage's files without removed samples, with a matching manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from filters.recipe import Recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import bulk_reads, entries, read_entry, write_entries
from sdtrain.dataset.removal_ledger import digest_sql, read_ledger
from sdtrain.dataset.rewriting import Removed
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Stage, Table, record
from sdtrain.dataset.sync import discard


def touched_entries(
    dataset: DatasetDir, stage: Stage[Any], shards: Sequence[int]
) -> Iterator[tuple[ShardReport, list[Path]]]:
    """Yields the manifest entries that list the tables of `shards`, and these tables; an entry may have several."""
    tables = {stage.table.path(dataset, shard) for shard in shards} if stage.table else set()
    names = {dataset.relative(path) for path in tables}
    for entry in entries(dataset, stage.name) if names else ():
        if listed := sorted(names & entry.outputs.keys()):
            yield entry, [dataset.root / name for name in listed]


@dataclass
class StageRewrite:
    """Applies a removal stage by stage, in pipeline order because a stage's fingerprint includes the earlier ones.

    Each step is idempotent. How files are rewritten and counted, each stage states in its table's `rewriting`.

    Attributes:
        dataset: its ledger lists the removed samples.
        recipe: the dataset's.
        touched: by stage, the shards whose files hold removed samples.
        finished: by stage, the shards that must be finished afterwards.
    """

    dataset: DatasetDir
    recipe: Recipe
    connection: duckdb.DuckDBPyConnection
    touched: dict[str, list[int]]
    finished: dict[str, list[int]]

    def __post_init__(self) -> None:
        self.connection.register("ledger", read_ledger(self.dataset.removed))
        self.connection.execute("CREATE TEMP TABLE removed AS SELECT DISTINCT digest FROM ledger WHERE kind = 'uid'")

    def rewrite(self, stage: Stage[Any]) -> None:
        """Removes samples from a stage's files, and recounts."""
        if stage.table is None:
            return
        touched = self.touched.get(stage.name, [])
        for shard in touched:
            if stage.table.path(self.dataset, shard).exists():
                self._rewrite_shard(stage.name, shard, stage.table)
        for entry, tables in list(touched_entries(self.dataset, stage, touched)):
            self._recount(stage, stage.table, entry, [path for path in tables if path.exists()])

    def restamp(self, stage: Stage[Any]) -> None:
        """Updates the fingerprints of finished shards to the rewritten files of earlier stages."""
        if stage.inputs.keys() <= {stage.name}:
            return  # no other stage is in its fingerprint, and its inputs may be out of reach by now
        with bulk_reads():
            write_entries(self.dataset, self._restamped(stage))

    def _restamped(self, stage: Stage[Any]) -> Iterator[tuple[ShardReport, Iterable[Path]]]:
        """Yields the entries whose fingerprint changed, with the files beside them."""
        for shard in self.finished.get(stage.name, []):
            entry = read_entry(self.dataset, stage.name, shard)
            if entry is None:
                continue
            digest = stage.fingerprint(self.dataset, self.recipe, shard)
            if digest != entry.fingerprint:
                yield entry.model_copy(update={"fingerprint": digest}), stage.beside(self.dataset, shard)

    def _rewrite_shard(self, name: str, shard: int, table: Table[Any]) -> None:
        dataset, path = self.dataset, table.path(self.dataset, shard)
        if table.rewriting.has_tar and not path.with_suffix(".tar").exists():
            for useless in (path, dataset.manifest_entry(name, shard)):  # without its tar; builds recreate both
                discard(dataset, useless)
            return
        columns = pq.read_schema(path).names
        listed = [sql for name, sql in table.rewriting.origins.items() if name in columns]
        origins = [uid for each in listed for uid in self._removed_in(path, each)]
        removed = Removed(path, self._removed_in(path, "uid"), origins, self.finished)
        table.rewriting.drop(dataset, self.recipe, shard, removed)

    def _removed_in(self, table: Path, each: str) -> list[str]:
        uids = f"SELECT DISTINCT {each} AS uid FROM read_parquet(?)"  # noqa: S608 - the names are constants
        query = f"SELECT uid FROM ({uids}) WHERE {digest_sql('uid', 'uid')} IN (FROM removed) ORDER BY uid"  # noqa: S608
        return [uid for (uid,) in self.connection.execute(query, [str(table)]).fetchall()]

    def _recount(self, stage: Stage[Any], table: Table[Any], entry: ShardReport, tables: Sequence[Path]) -> None:
        counted = table.rewriting.recount(self.dataset, entry, tables) if tables else None
        if counted is not None:
            record(stage, self.dataset, counted)
