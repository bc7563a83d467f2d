"""Selection of LAION-shaped rows: ours beside DuckDB's bare COPY and pandas, in one run.

    python -m tests.benchmarks.select [--quick]

DuckDB's COPY with the same predicates is the limit: it writes the rows as they come, into one file. Ours and pandas do
more: uids, repeated rows taken out, a seeded shuffle, shards of exactly 10,000; ours also gives a reason for each
dropped row and syncs what it wrote to the disk. pandas reads file by file, as all rows would not fit into memory. Each
contender is a process of its own, so that its peak memory is its own; the best of its runs counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

ROWS, QUICK_ROWS, ROWS_PER_FILE = 50_000_000, 4_000_000, 2_000_000
SAMPLES_PER_SHARD = 10_000
RULES = {"min_side": 512.0, "min_aesthetic": 5.0, "max_watermark": 0.5}
WORDS = [
    "photo",
    "image",
    "portrait",
    "of",
    "the",
    "a",
    "in",
    "with",
    "red",
    "blue",
    "old",
    "new",
    "house",
    "garden",
    "beach",
    "city",
    "night",
    "summer",
    "wedding",
    "dress",
    "vintage",
    "poster",
    "print",
    "canvas",
    "wall",
    "art",
    "design",
    "modern",
    "kitchen",
    "living",
    "room",
    "car",
    "classic",
    "wooden",
    "table",
    "black",
    "white",
    "gold",
    "ring",
    "necklace",
    "silver",
    "sunset",
    "mountain",
    "forest",
    "river",
    "lake",
    "flower",
    "rose",
    "cat",
    "dog",
    "horse",
    "bird",
]


def make_metadata(folder: Path, rows: int) -> None:
    """Parquet with LAION's columns: distinct URLs of about 84 and captions of about 46 characters, 62 % https.

    As in laion2B-en, 26 % have an aesthetic score over 5 (600 million of 2.3 billion); about half have sides of 512 px
    or more and two thirds a watermark probability under 0.5, so that one row in eleven is good.
    """
    for number in range(-(-rows // ROWS_PER_FILE)):
        begin, end = number * ROWS_PER_FILE, min(rows, (number + 1) * ROWS_PER_FILE)
        duckdb.execute(
            f"""
            COPY (
                SELECT CASE WHEN hash(i) % 100 < 62 THEN 'https' ELSE 'http' END || '://' || {_word(1)} || '-'
                    || {_word(2)} || (hash(i + 3) % 70)::VARCHAR || '.example.com/' || {_word(4)} || '/'
                    || (2008 + hash(i + 5) % 14)::VARCHAR || '/' || {_word(6)} || '-' || {_word(7)} || '-'
                    || printf('%x', hash(i + 8)) || '-' || i || '.jpg' AS URL,
                {" || ' ' || ".join(_word(k) for k in range(10, 17))} || ' ' || (hash(i + 17) % 100000)::VARCHAR
                    AS TEXT,
                (200 + hash(i + 20) % 1100)::INTEGER AS WIDTH, (200 + hash(i + 21) % 1100)::INTEGER AS HEIGHT,
                0.28 + (hash(i + 22) % 10000) / 50000 AS similarity,
                (hash(i + 23) % 9223372036854775807)::BIGINT AS hash,
                ((hash(i + 24) % 100000) / 133333)::FLOAT AS pwatermark,
                ((hash(i + 25) % 100000) / 100000)::FLOAT AS punsafe,
                (3.22 + (hash(i + 26) % 10000) / 4167)::FLOAT AS AESTHETIC_SCORE
                FROM (SELECT i, {WORDS} AS words FROM range({begin}, {end}) t(i))
            ) TO '{folder}/part-{number:05d}.parquet' (FORMAT parquet, COMPRESSION snappy)
            """
        )


def _word(salt: int) -> str:
    return f"words[1 + (hash(i + {salt}) % {len(WORDS)})::INT]"


def select_ours(metadata: Path, output: Path) -> int:
    from filters.select.stage import select_rows
    from filters.select_config import SelectConfig
    from sdtrain.dataset.layout import DatasetDir

    config = SelectConfig(metadata=str(metadata), rules=RULES, samples_per_shard=SAMPLES_PER_SHARD)
    return select_rows(DatasetDir(output), config).num_out


def select_duckdb(metadata: Path, output: Path) -> int:
    where = "WIDTH >= 512 AND HEIGHT >= 512 AND AESTHETIC_SCORE > 5.0 AND pwatermark < 0.5"
    source = f"FROM read_parquet('{metadata}/*.parquet') WHERE {where}"
    copied = duckdb.execute(f"COPY (SELECT * {source}) TO '{output}.parquet' (FORMAT parquet, COMPRESSION zstd)")
    return copied.fetchone()[0]


def select_pandas(metadata: Path, output: Path) -> int:
    import pandas as pd

    parts = []
    for file in sorted(metadata.glob("*.parquet")):
        table = pd.read_parquet(file)
        good = (table.WIDTH >= 512) & (table.HEIGHT >= 512) & (table.AESTHETIC_SCORE > 5.0) & (table.pwatermark < 0.5)
        parts.append(table[good])
    chosen = pd.concat(parts).drop_duplicates(["URL", "TEXT"]).sample(frac=1, random_state=42)
    output.mkdir()
    for begin in range(0, len(chosen), SAMPLES_PER_SHARD):
        shard = chosen.iloc[begin : begin + SAMPLES_PER_SHARD]
        shard.to_parquet(output / f"{begin // SAMPLES_PER_SHARD:05d}.parquet", compression="zstd")
    return len(chosen)


CONTENDERS: dict[str, Callable[[Path, Path], int]] = {
    "sdtrain": select_ours,
    "duckdb COPY": select_duckdb,
    "pandas": select_pandas,
}


def run_contender(name: str, folder: Path) -> dict[str, float]:
    """One contender's seconds, selected rows and peak memory, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.select", "--contender", name, "--folder", str(folder)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
    os.sync()  # what one has left to write must not slow the next
    result = json.loads(ended.stdout.splitlines()[-1])
    print(f"{name:12} {result['seconds']:8.2f} s {result['peak_rss_mb']:8.0f} MB", flush=True)
    return result


def be_contender(name: str, folder: Path) -> None:
    for module in (
        "filters.select.stage",
        "pandas",
        "pyarrow.parquet",
    ):  # which DuckDB imports too, for lists of values
        importlib.import_module(module)
    started = time.monotonic()
    selected = CONTENDERS[name](folder / "metadata", folder / name.replace(" ", "-"))
    seconds = time.monotonic() - started
    peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "selected": selected, "peak_rss_mb": peak_rss_mb}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows instead of {ROWS:,}")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        be_contender(arguments.contender, arguments.folder)
        return
    rows = QUICK_ROWS if arguments.quick else ROWS
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        (folder / "metadata").mkdir()
        make_metadata(folder / "metadata", rows)
        os.sync()
        # Ours and the limit twice, in turns, because a machine is not always equally fast; pandas takes minutes.
        turns = ("duckdb COPY", "sdtrain", "duckdb COPY", "sdtrain", "pandas")
        results = [(name, run_contender(name, folder)) for name in turns]
    assert len({result["selected"] for _, result in results}) == 1, results
    best = {name: min(r["seconds"] for n, r in results if n == name) for name in CONTENDERS}
    figures = {
        "rows": rows,
        "vs_duckdb_copy": round(best["duckdb COPY"] / best["sdtrain"], 3),
        "vs_pandas": round(best["pandas"] / best["sdtrain"], 2),
        "peak_rss_mb": round(max(r["peak_rss_mb"] for n, r in results if n == "sdtrain")),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
