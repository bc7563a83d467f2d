"""Finds samples by uid, URL, host or sha256 in the shards that training reads, and among those removed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.exposure.packed_order import FEW, shards_holding
from filters.recipe_record import read_recipe
from filters.select.list_entries import Entry
from filters.select.sql_functions import of_hosts_sql, register_host_of
from sdtrain.dataset.files import numbered_files
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.removal_ledger import key_digest
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.exposure.located import present_as_located, removed_as_located
from sdtrain.exposure.removed_rows import read_removed_rows
from sdtrain.exposure.trained import table_folder
from sdtrain.loading.sample_record import Stage
from sdtrain.pack.captions import CAPTIONS

By = Literal["uid", "url", "host", "sha256"]
_SHARD_ROW = 'parse_filename(filename) AS "table", file_row_number AS row'


class Search:
    """The samples that some entries of one kind mean: a `Locate`, which remembers its answers.

    A few samples are found by their uids in a few tables. Otherwise the tables of all shards are read, once for each
    dataset, as their rows are in random order.
    """

    def __init__(self, by: By, entries: Sequence[Entry]) -> None:
        self._by, self._entries = by, sorted(set(map(str, entries)))
        self._found = dict[tuple[DatasetDir, Stage], pa.Table]()

    def __call__(self, dataset: DatasetDir, stage: Stage) -> pa.Table:
        """The samples in a dataset's shards of one stage, present and removed, as rows of LOCATED."""
        if (dataset, stage) not in self._found:
            with connected() as connection:
                connection.execute("SET preserve_insertion_order = false")
                register_host_of(connection)
                present = _Tables(connection, dataset).find(stage, self._by, self._entries)
            self._found[dataset, stage] = pa.concat_tables(
                [present_as_located(dataset, present), self._removed(dataset, stage)]
            )
        return self._found[dataset, stage]

    def _removed(self, dataset: DatasetDir, stage: Stage) -> pa.Table:
        """Those that were removed; their uids are known only where they were asked for."""
        rows = read_removed_rows(dataset.removed_rows)
        wanted = {key_digest(self._by, entry): entry for entry in self._entries}
        digests = pa.array(list(wanted), pa.string())
        if self._by == "host":
            parents = pc.list_parent_indices(rows["hosts"]).to_numpy()
            named = np.zeros(len(rows), bool)
            named[parents[pc.is_in(pc.list_flatten(rows["hosts"]), value_set=digests).to_numpy()]] = True
        else:
            named = pc.is_in(rows[self._by], value_set=digests).to_numpy()
        (places,) = np.nonzero(named & pc.equal(rows["stage"], stage).to_numpy())
        located = removed_as_located(dataset, rows.take(places), places)
        if self._by != "uid":
            return located
        uids = pa.array([wanted[digest] for digest in located["key"].to_pylist()], pa.string())
        return located.set_column(located.schema.get_field_index("uid"), "uid", uids)


class _Tables:
    """The tables of one dataset, with a connection that reads them."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, dataset: DatasetDir) -> None:
        self._connection, self._dataset = connection, dataset
        self._columns = TableColumns(dataset)

    def find(self, stage: Stage, by: By, entries: Sequence[str]) -> pa.Table:
        """Columns uid, url, caption, table and row, and of latents captions, of the samples that entries mean."""
        shards = list(numbered_files(table_folder(self._dataset, stage), ".parquet").values())
        if by == "sha256":
            by, entries = "uid", self._uids(self._dataset.images_table, "sha256", entries)
        if by == "uid" and len(entries) <= FEW:
            shards = shards_holding(shards, entries, self._seed()) or shards
        if stage == "encode":
            return self._rows(shards, f"uid, url, caption, {CAPTIONS}, {_SHARD_ROW}", by, entries)
        if by != "uid":
            by, entries = "uid", self._uids(self._dataset.selection, by, entries)
        packed = self._rows(shards, f"uid, {_SHARD_ROW}", by, entries)
        described = self._rows(self._of_shards(self._dataset.selection), "uid, url, caption", by, entries)
        return packed.join(described, "uid")

    def _seed(self) -> int:
        """Of the packing; where the recipe is lost, the samples are not found by it, and all shards are read."""
        return read_recipe(self._dataset).pack.seed if self._dataset.recipe.exists() else 0

    def _uids(self, table: Callable[[int], Path], by: By, entries: Sequence[str]) -> list[str]:
        found: list[str] = self._rows(self._of_shards(table), "uid", by, entries)["uid"].to_pylist()
        return found

    def _of_shards(self, table: Callable[[int], Path]) -> list[Path]:
        return [path for shard in selected_shards(self._dataset) if (path := table(shard)).exists()]

    def _rows(self, paths: Sequence[Path], columns: str, by: By, entries: Sequence[str]) -> pa.Table:
        parts, values = list[str](), dict[str, Any]({"wanted": list(entries)})
        for number, group in enumerate(self._columns.groups(paths)):
            values[f"paths_{number}"] = list(map(str, group))
            source = f"read_parquet($paths_{number}, filename = true, file_row_number = true)"
            had = columns if CAPTIONS in pq.read_schema(group[0]).names else columns.replace(CAPTIONS, _NO_CAPTIONS)
            parts.append(f"SELECT {had} FROM {source} WHERE {_condition(by, entries)}")  # noqa: S608 - constants
        if not parts:
            parts, values = [f"SELECT {_empty(columns)} WHERE false"], {}
        return self._connection.execute(" UNION ALL ".join(parts), values).to_arrow_table()


_LIST = "STRUCT(source VARCHAR, text VARCHAR, origin_uid VARCHAR)[]"
_NO_CAPTIONS = f"NULL::{_LIST} AS {CAPTIONS}"
# Trimming takes five times as long as the lookup, and nearly no URL needs it.
_TRIMMED_URL = "CASE WHEN regexp_matches(url, '^[!-~](?s:.*[!-~])?$') THEN url ELSE trim(url) END"
_TYPES: Mapping[str, str] = {"row": "BIGINT", CAPTIONS: _LIST}


def _empty(columns: str) -> str:
    names = [name.split()[-1].strip('"') for name in columns.split(", ")]
    return ", ".join(f'NULL::{_TYPES.get(name, "VARCHAR")} AS "{name}"' for name in names)


def _condition(by: By, entries: Sequence[str]) -> str:
    wanted = "(SELECT unnest($wanted))"
    if by == "host":
        return of_hosts_sql("url", entries, "$wanted")
    return f"{_TRIMMED_URL if by == 'url' else by} IN {wanted}"
