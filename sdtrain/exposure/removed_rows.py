"""Reads the rows that removed samples had in a dataset's shards, as digests that recognise them but reveal nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdtrain.dataset.files import read_parquet
from sdtrain.errors import UserError

NO_ROW = -1
SCHEMA = pa.schema(
    [
        ("removal", pa.int32()),  # number of earlier removals
        ("stage", pa.string()),  # encode or pack
        ("table", pa.string()),  # the shard's table
        ("before", pa.string()),  # digest of its footer
        ("after", pa.string()),  # none until the removal is finished
        ("num_rows", pa.int32()),  # of the table before
        ("row", pa.int32()),  # in it, from 0; NO_ROW if only texts of removed samples left other samples
        ("height", pa.int32()),  # of the latent; none for packed images
        ("width", pa.int32()),
        ("uid", pa.string()),  # `sdtrain.dataset.removal_ledger.key_digest` of the sample's own keys
        ("url", pa.string()),
        ("sha256", pa.string()),
        ("hosts", pa.list_(pa.string())),  # of its host and the domains above it
        ("removed_at", pa.timestamp("s", tz="UTC")),
    ]
)


class RemovedRows:
    """A dataset's removed rows, by the table that they were in.

    `rows` are as `SCHEMA`, and a row's place is its number in them.
    """

    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows
        named = pc.binary_join_element_wise(rows["stage"], rows["table"], "/").combine_chunks().dictionary_encode()
        codes = named.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(named.dictionary)))[:-1]
        self._places = dict(zip(named.dictionary.to_pylist(), np.split(order, ends), strict=False))

    def of(self, stage: str, table: str) -> NDArray[np.int64]:
        """The places of the rows that were in a table, oldest removal first."""
        return self._places.get(f"{stage}/{table}", np.empty(0, np.int64))


def read_removed_rows(path: Path) -> pa.Table:
    """All rows, oldest removal first; none where nothing was removed since they are recorded.

    UserError if the file is damaged.
    """
    try:
        return read_parquet(path).cast(SCHEMA) if path.exists() else SCHEMA.empty_table()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}, which says where removed samples were, cannot be read ({error}). Put it back from a backup, or "
            "delete it: then no one can tell which steps of training saw them."
        ) from error
