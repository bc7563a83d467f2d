"""Reads Parquet files and what they say of themselves, without the libraries that pyarrow's own reader loads."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FINGERPRINT = b"sdtrain.fingerprint"
"""In a table's metadata: of what it was made. A shard without a manifest entry can then be told from a stale one."""


def has_fingerprint(path: Path) -> bool:
    """Whether the file is a table that says of what it was made, so that its shard is used again where it fits."""
    if path.suffix != ".parquet" or not path.exists():
        return False
    try:
        return FINGERPRINT in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One file's rows, without pyarrow's read_table, which imports pandas and more."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)
