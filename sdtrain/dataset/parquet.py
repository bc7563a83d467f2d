"""Reads Parquet files without the libraries that pyarrow's own reader loads."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One file's rows, without pyarrow's read_table, which imports pandas and more."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)
