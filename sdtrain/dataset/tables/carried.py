"""The columns of a user's own that a selection carries, as its tables tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_KEY = b"sdtrain.carried"


def mark_carried(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Returns the rows with a note of the columns `names` in the schema; unchanged if there are none."""
    return rows.replace_schema_metadata({_KEY: json.dumps(list(names)).encode()}) if names else rows


def carried_columns(selection: Path) -> list[str]:
    """Returns the columns that were marked in a selection's table."""
    marked: list[str] = json.loads((pq.read_schema(selection).metadata or {}).get(_KEY, b"[]"))
    return marked
