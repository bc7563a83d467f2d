"""Which URLs may be fetched at all, as Python for one URL and as SQL for billions."""

from __future__ import annotations

import duckdb
from duckdb.func import PythonUDFType
from duckdb.sqltypes import BOOLEAN, VARCHAR

from sdtrain.dataset.addresses import why_not_allowed

__all__ = ["allowed_sql", "register_url_check", "why_not_allowed"]

# A plain web address: no user, no port, no literal address, a name with a dot that does not end like a local one.
# It must be stricter than `why_not_allowed`, never looser.
_SURELY_FINE = (
    r"^(?i:https?)://(?:[a-zA-Z0-9_-]+\.)+"
    r"(?i:com|org|net|edu|gov|co|io|info|biz|me|tv|us|eu|uk|de|fr|it|es|nl|ru|pl|ca|au|jp|br|in|ch|se|no|dk|fi|at|be|cz)"
    r"(?:[/?#]|$)"
)


def register_url_check(connection: duckdb.DuckDBPyConnection, allow_private: bool) -> None:
    """Makes `why_not_allowed` a SQL function of `connection`, for `allowed_sql`."""

    def may_be_fetched(url: str) -> bool:
        return why_not_allowed(url, allow_private) is None

    connection.create_function("may_be_fetched", may_be_fetched, [VARCHAR], BOOLEAN, type=PythonUDFType.NATIVE)


def allowed_sql(column: str) -> str:
    """SQL condition that is true for URLs that may be fetched.

    Nearly all URLs of LAION are plain ones, which a regular expression can tell; Python looks at the few others only.
    """
    return f"CASE WHEN regexp_matches({column}, '{_SURELY_FINE}') THEN true ELSE may_be_fetched({column}) END"
