"""Thirty rows of metadata in three files, and what joins and lists make of them."""

import hashlib

import duckdb
import mmh3
import pyarrow as pa
import pyarrow.parquet as pq

from filters.columns import ALIASES
from filters.select.metadata_files import find_metadata
from filters.select.pushdown import Pushdown
from filters.select.schema import normalised_sql
from filters.select.side_inputs import load_side_inputs

NUM_ROWS = 30
URLS = [f"https://{'img.' * (i % 3)}host{i % 5}.example/{i}.jpg" for i in range(NUM_ROWS)]
TEXTS = [None if i == 7 else f"caption ä {i}" for i in range(NUM_ROWS)]
HASHES = [mmh3.hash64((url or "") + (text or ""))[0] for url, text in zip(URLS, TEXTS, strict=True)]
UIDS = [hashlib.md5(f"{url}\n{text or ''}".encode()).hexdigest() for url, text in zip(URLS, TEXTS, strict=True)]
MD5S = [hashlib.md5(str(i).encode()).hexdigest() for i in range(NUM_ROWS)]


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_metadata(folder):
    """Three files: with hash, without, and with scores of its own."""
    parts = [slice(0, 10), slice(10, 20), slice(20, 30)]
    write(folder / "a.parquet", URL=URLS[parts[0]], TEXT=TEXTS[parts[0]], hash=HASHES[parts[0]])
    write(folder / "b.parquet", URL=URLS[parts[1]], TEXT=TEXTS[parts[1]])
    scores = [None if i % 2 else 0.75 for i in range(10)]
    write(folder / "c.parquet", URL=URLS[parts[2]], TEXT=TEXTS[parts[2]], hash=HASHES[parts[2]], pwatermark=scores)
    return str(folder)


def apply(select, what="rows"):
    """The rows after joins and lists, in the order of NUM_ROWS, or the remarks."""
    files = find_metadata(select.metadata)
    with duckdb.connect() as connection:
        side_inputs = load_side_inputs(connection, select, files)
        if what == "remarks":
            return list(side_inputs.remarks)
        rows, values = normalised_sql(files, Pushdown({}, side_inputs.joins.columns), side_inputs.compute_hash)
        # A cursor, because the selection uses one for each thread.
        table = connection.cursor().execute(side_inputs.lists.sql(side_inputs.joins.sql(rows)), values).to_arrow_table()
    assert table.column_names == [*ALIASES, "list_reason"]
    return sorted(table.to_pylist(), key=lambda row: URLS.index(row["url"]))
