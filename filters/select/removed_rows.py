"""Which rows a dataset's ledger of removed samples knows, as SQL."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.select.sql_functions import UID, host_sql, register_host_of
from sdtrain.dataset.removal_ledger import digest_sql, removed_hashes

# What a row is known by: the kind of the ledger's row, and the row's own value.
METADATA_KEYS = {"uid": UID, "url": "trim(url)", "host": host_sql("trim(url)"), "sha256": "sha256"}
_BATCH = 100_000


class Blocked:
    """A ledger in tables of a connection.

    Args:
        connection: where the rows are, or are read.
        ledger: rows as in `sdtrain.dataset.removal_ledger.LEDGER`.
    """

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

    def sql(self, rows: str, keys: dict[str, str]) -> str:
        """`rows` (a SELECT) and column `is_removed`.

        Args:
            rows: to look at.
            keys: kind -> SQL of the row's value for it; see `METADATA_KEYS`.
        """
        lookups = list[tuple[str, str]]()
        for kind in ("uid", "url", "sha256", "host"):
            if kind in self._kinds and kind in keys:
                lookups += [(kind, digest_sql(kind, value)) for value in self._values(kind, keys[kind])]
        joins = [f"LEFT JOIN removed_{kind} x{n} ON x{n}.digest = r.key{n}" for n, (kind, _) in enumerate(lookups)]
        keyed = "".join(f", {digest} AS key{n}" for n, (_, digest) in enumerate(lookups))
        found = " OR ".join(f"x{n}.digest IS NOT NULL" for n in range(len(lookups))) or "false"
        hidden = ", ".join(f"key{n}" for n in range(len(lookups)))
        shown = f"r.* EXCLUDE ({hidden})" if hidden else "r.*"
        # S608: names and expressions are constants, and numbers.
        return f"SELECT {shown}, ({found}) AS is_removed FROM (SELECT *{keyed} FROM ({rows})) r {' '.join(joins)}"  # noqa: S608

    def _values(self, kind: str, value: str) -> list[str]:
        if kind != "host":
            return [value]
        # A host means its subdomains too: its last labels, as many as a listed host has, are looked up.
        return [f"array_to_string(string_split({value}, '.')[-{number}:], '.')" for number in self._num_labels]


def near_duplicate_uids(
    connection: duckdb.DuckDBPyConnection, rows: str, values: list[object], ledger: pa.Table
) -> pa.Table:
    """The uids of rows whose perceptual hash is near a removed one, each once.

    Args:
        connection: reads the rows.
        rows: a SELECT of `uid` and `phash`.
        values: to bind.
        ledger: rows as in `sdtrain.dataset.removal_ledger.LEDGER`.
    """
    hashes = removed_hashes(ledger)
    found = list[str]()
    if len(hashes):
        removed, radius = hashes["phash"].to_numpy(), hashes["radius"].to_numpy()
        known = f"SELECT uid, phash FROM ({rows}) WHERE phash IS NOT NULL"  # noqa: S608
        for batch in connection.execute(known, values).to_arrow_reader(_BATCH):
            near = _are_near(batch["phash"].to_numpy(), removed, radius)
            found += batch["uid"].filter(pa.array(near)).to_pylist()
    return pa.table({"uid": pa.array(sorted(set(found)), pa.string())})


def _are_near(hashes: NDArray[np.int64], removed: NDArray[np.int64], radius: NDArray[np.int32]) -> NDArray[np.bool_]:
    # One after the other: removed hashes are few, and this way it is ten times as fast as a join.
    near = np.zeros(len(hashes), bool)
    for other, bits in zip(removed, radius, strict=True):
        near |= np.bitwise_count((hashes ^ other).view(np.uint64)) <= bits
    return near
