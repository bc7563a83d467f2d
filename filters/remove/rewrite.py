"""Rewriting of each stage's files without removed samples, with a matching manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import duckdb
import pyarrow.parquet as pq

from filters.recipe import Recipe
from filters.remove.shard_files import drop_images, drop_latents, drop_packed, drop_rows
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, entries, read_entry, write_entry
from sdtrain.dataset.removal_ledger import REMOVED, digest_sql, read_ledger
from sdtrain.dataset.s3.files import discard
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Stage, Table, record
from sdtrain.download.publish import report_images
from sdtrain.download.stage import DOWNLOAD
from sdtrain.pack.plan import SHORT, num_packed, short_shards

_TARS = {"download", "pack", "encode"}
"""Stages whose tars `StageRewrite` can rewrite."""


def require_rewritable(stages: Iterable[Stage[Any]]) -> None:
    """Raises AssertionError for a stage whose tars cannot be rewritten; called before a journal exists."""
    for stage in stages:
        if stage.table and "tar" in stage.table.columns and stage.name not in _TARS:
            raise AssertionError(f"stage '{stage.name}' writes tars, and filters.remove.rewrite cannot rewrite them")


@dataclass
class StageRewrite:
    """Applies a removal stage by stage, in pipeline order because a stage's fingerprint includes the earlier ones.

    Each step is idempotent.

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
        touched = self.touched.get(stage.name, [])
        for shard in touched:
            if stage.table and stage.table.path(self.dataset, shard).exists():
                self._rewrite_shard(stage.name, shard, stage.table)
        if stage.name == "select":
            self._recount_selections(set(touched))
            return
        for shard in touched:
            entry = read_entry(self.dataset, stage.name, shard)
            if entry:
                record(stage, self.dataset, self._recounted(stage, entry))

    def restamp(self, stage: Stage[Any]) -> None:
        """Updates the fingerprints of finished shards to the rewritten files of earlier stages."""
        if stage.name == "select":
            return  # its fingerprint covers the metadata alone
        for shard in self.finished.get(stage.name, []):
            entry = read_entry(self.dataset, stage.name, shard)
            if entry is None:
                continue
            digest = stage.fingerprint(self.dataset, self.recipe, shard)
            if digest != entry.fingerprint:
                record(stage, self.dataset, entry.model_copy(update={"fingerprint": digest}))

    def _rewrite_shard(self, stage: str, shard: int, described: Table) -> None:
        dataset, table = self.dataset, described.path(self.dataset, shard)
        uids = self._removed_in(table)
        tar = table.with_suffix(".tar")
        has_tar = "tar" in described.columns
        if has_tar and not tar.exists():
            for path in (table, dataset.manifest_entry(stage, shard)):  # useless without its tar; builds recreate both
                discard(dataset, path)
        elif stage == "download":
            drop_images(dataset, shard, uids, self._wanted_fingerprint(shard))
        elif uids and stage == "dedup":
            self._regroup(uids)
        elif uids and stage == "decide":
            drop_rows(table, uids, self._short(uids))
        elif uids and stage == "pack":
            drop_packed(tar, table, uids)
        elif uids and stage == "encode":
            drop_latents(tar, table, uids)
        elif uids:
            drop_rows(table, uids)

    def _removed_in(self, table: Path) -> list[str]:
        query = f"SELECT DISTINCT uid FROM read_parquet(?) WHERE {digest_sql('uid', 'uid')} IN (FROM removed)"  # noqa: S608
        return [uid for (uid,) in self.connection.execute(query, [str(table)]).fetchall()]

    def _wanted_fingerprint(self, shard: int) -> str | None:
        is_wanted = shard in self.finished.get("download", [])
        return DOWNLOAD.fingerprint(self.dataset, self.recipe, shard) if is_wanted else None

    def _regroup(self, uids: list[str]) -> None:
        """Regroups without removed members; drops groups with a single one left."""
        kept = (
            "SELECT * REPLACE (min(uid) OVER (PARTITION BY group_id) AS group_id) FROM read_parquet($table) "
            "WHERE uid NOT IN (SELECT unnest($uids)) QUALIFY count(*) OVER (PARTITION BY group_id) > 1 ORDER BY uid"
        )
        with publish(self.dataset.duplicates) as temporary:
            written = f"COPY ({kept}) TO $target (FORMAT parquet, COMPRESSION zstd)"
            values = {"table": str(self.dataset.duplicates), "uids": uids, "target": str(temporary)}
            self.connection.execute(written, values)

    def _short(self, uids: list[str]) -> dict[bytes, bytes]:
        """Returns the number of samples each packed shard is short of, which packing needs to rebuild a lost one."""
        if not self.finished.get("pack"):
            return {}
        short = Counter(short_shards(self.dataset.decisions))
        short.update(num_packed(self.dataset, self.recipe.pack, uids))
        return {SHORT: json.dumps({str(shard): number for shard, number in sorted(short.items())}).encode()}

    def _recount_selections(self, shards: set[int]) -> None:
        for entry in entries(self.dataset, "select"):
            paths = {name: self.dataset.root / name for name in entry.outputs}
            changed = [path for path in paths.values() if int(path.stem) in shards and path.exists()]
            if not changed or not all(path.exists() for path in paths.values()):
                continue
            left = sum(pq.read_metadata(path).num_rows for path in paths.values())
            dropped = Counter(entry.dropped)
            dropped[REMOVED] += entry.num_out - left
            outputs = entry.outputs | describe_outputs(self.dataset, changed)
            counts = {"num_out": left, "dropped": dict(sorted((+dropped).items()))}
            write_entry(self.dataset, entry.model_copy(update=counts | {"outputs": outputs}))

    def _recounted(self, stage: Stage[Any], entry: ShardReport) -> ShardReport:
        if entry.stage == "download":
            report = report_images(self.dataset, entry.shard)
            return report.model_copy(update={"fingerprint": entry.fingerprint, "seconds": entry.seconds})
        num_in, dropped = self._counts(stage, entry)
        outputs = describe_outputs(self.dataset, [self.dataset.root / name for name in entry.outputs])
        counts = {"num_in": num_in, "num_out": num_in - sum(dropped.values()), "dropped": dropped}
        return ShardReport.model_validate(entry.model_dump() | counts | {"outputs": outputs})

    def _counts(self, stage: Stage[Any], entry: ShardReport) -> tuple[int, dict[str, int]]:
        table = cast(Table, stage.table).path(self.dataset, entry.shard)
        if entry.stage == "dedup":
            place = "row_number() OVER (PARTITION BY group_id ORDER BY kind, uid)"
            rows = f"SELECT kind, {place} AS place FROM read_parquet(?)"  # noqa: S608
            query = f"SELECT kind, count(*) FROM ({rows}) WHERE place > 1 GROUP BY kind ORDER BY kind"  # noqa: S608
            num_in = sum(score.num_out for score in entries(self.dataset, "score"))
            return num_in, dict(self.connection.execute(query, [str(table)]).fetchall())
        has_reasons = "reason" in pq.read_schema(table).names
        query = "SELECT reason, count(*) FROM read_parquet(?) WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
        dropped = dict(self.connection.execute(query, [str(table)]).fetchall()) if has_reasons else {}
        return pq.read_metadata(table).num_rows, dropped
