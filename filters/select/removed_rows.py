"""SQL lookup of rows in a dataset's ledger of removed samples."""

from __future__ import annotations

from collections.abc import Mapping

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.select.sql_functions import UID, Lookup, host_suffix_sql, lookup_sql, register_host_of
from sdtrain.dataset.removal_ledger import digest_sql, removed_hashes

_BATCH = 100_000


class Blocked:
    """A ledger (rows as in `sdtrain.dataset.removal_ledger.LEDGER`) in tables of a connection."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, ledger: pa.Table) -> None:
        self._num_labels: list[int] = []
        self._kinds = set(ledger["kind"].to_pylist()) - {"phash"}
        connection.register("ledger", ledger)
        for kind in self._kinds:
            columns = "DISTINCT digest, labels"
            connection.execute(
                f"CREATE OR REPLACE TABLE removed_{kind} AS SELECT {columns} FROM ledger WHERE kind = ?",  # noqa: S608
                [kind],
            )
        connection.unregister("ledger")
        if "host" in self._kinds:
            register_host_of(connection)
            labels = connection.execute("SELECT DISTINCT labels FROM removed_host ORDER BY labels").fetchall()
            self._num_labels = [number for (number,) in labels]

    def sql(self, rows: str, uid: str = UID) -> str:
        """Adds column `is_removed` to `rows` (a SELECT of `url`, `sha256` and what `uid`, the uid's SQL, names)."""
        values = {"uid": [uid], "url": ["trim(url)"], "sha256": ["sha256"]}
        values["host"] = [host_suffix_sql(num) for num in self._num_labels]
        keys = [(kind, digest_sql(kind, value)) for kind in values if kind in self._kinds for value in values[kind]]
        lookups = [Lookup(f"removed_{kind}", f"x{n}", key, "digest") for n, (kind, key) in enumerate(keys)]
        found = " OR ".join(f"{lookup.alias}.digest IS NOT NULL" for lookup in lookups) or "false"
        return lookup_sql(rows, lookups, f", ({found}) AS is_removed")


def near_duplicate_uids(
    connection: duckdb.DuckDBPyConnection, rows: str, values: Mapping[str, object], ledger: pa.Table
) -> pa.Table:
    """Returns distinct uids in `rows` (a SELECT of `uid` and `phash`) whose hash is near a removed one."""
    hashes = removed_hashes(ledger)
    found = list[str]()
    if len(hashes):
        removed, radius = hashes["phash"].to_numpy(), hashes["radius"].to_numpy()
        known = f"SELECT uid, phash FROM ({rows}) WHERE phash IS NOT NULL"  # noqa: S608
        for batch in connection.execute(known, values or None).to_arrow_reader(_BATCH):
            near = _are_near(batch["phash"].to_numpy(), removed, radius)
            found += batch["uid"].filter(pa.array(near)).to_pylist()
    return pa.table({"uid": pa.array(sorted(set(found)), pa.string())})


def _are_near(hashes: NDArray[np.int64], removed: NDArray[np.int64], radius: NDArray[np.int32]) -> NDArray[np.bool_]:
    # One at a time: removed hashes are few, and this is ten times as fast as a join.
    near = np.zeros(len(hashes), bool)
    for other, bits in zip(removed, radius, strict=True):
        near |= np.bitwise_count((hashes ^ other).view(np.uint64)) <= bits
    return near
