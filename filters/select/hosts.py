"""The host of a URL, as SQL for billions."""

from __future__ import annotations

import duckdb
from duckdb.func import PythonUDFType
from duckdb.sqltypes import VARCHAR

from sdtrain.dataset.addresses import host_of

# A host of letters, digits, hyphens and underscores, followed by nothing that changes what the host is.
_PLAIN = r"^(?i:https?)://([a-zA-Z0-9_-]+(?:[.][a-zA-Z0-9_-]+)*)(?:[/?#]|$)"


def register_host_of(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes `host_of` a SQL function of `connection`, for `host_sql`."""
    connection.create_function("host_of", host_of, [VARCHAR], VARCHAR, type=PythonUDFType.NATIVE)


def host_sql(column: str) -> str:
    """SQL for the host of a URL: nearly all are plain, which a regular expression reads, and Python the few others."""
    plain = f"lower(regexp_extract({column}, '{_PLAIN}', 1))"
    return f"CASE WHEN regexp_matches({column}, '{_PLAIN}') THEN {plain} ELSE host_of({column}) END"
