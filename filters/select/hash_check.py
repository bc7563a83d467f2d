"""Whether a column `hash` holds what LAION's does."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from filters.select.schema import MetadataFile, normalised_sql
from filters.select.sql_functions import laion_hash
from sdtrain.errors import UserError

_SAMPLE_ROWS = 1000
_ROWS_PER_FILE = 10


def check_hashes(connection: duckdb.DuckDBPyConnection, files: Sequence[MetadataFile]) -> int:
    """Compares `hash` with URL and TEXT on some rows of every file that has all three.

    Returns:
        How many rows were compared.

    Raises:
        UserError: a `hash` is something else; names the file and one example.
    """
    checked = [file for file in files if {"hash", "url", "caption"} <= set(file.columns)]
    per_file = max(_ROWS_PER_FILE, _SAMPLE_ROWS // max(1, len(checked)))
    return sum(_check_file(connection, file, per_file) for file in checked)


def _check_file(connection: duckdb.DuckDBPyConnection, file: MetadataFile, num_rows: int) -> int:
    rows, values = normalised_sql([file])
    sample = f"SELECT url, caption, hash FROM ({rows}) LIMIT {num_rows}"  # noqa: S608 - built from ALIASES
    compared = 0
    for url, caption, found in connection.execute(sample, values).fetchall():
        if found is None and file.types["hash"].endswith("INT"):
            continue  # not known here; in other types it may be text that is no number
        compared += 1
        if found != laion_hash(url, caption):
            raise UserError(
                f"Column '{file.columns['hash']}' of {file.path} is not the hash of URL and TEXT: for "
                f"{url} it holds {found}, not {laion_hash(url, caption)}. Go by url_caption "
                "instead of hash."
            )
    return compared
