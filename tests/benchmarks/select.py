"""Selection of LAION-shaped rows: ours beside DuckDB's bare COPY and pandas, in one run.

    python -m tests.benchmarks.select [--quick]

Ours does more than both: reasons for each dropped row, a seeded shuffle, exact shards. DuckDB's COPY with the same
predicates is the limit. Each contender is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

ROWS, QUICK_ROWS = 20_000_000, 1_000_000
NUM_FILES, SAMPLES_PER_SHARD = 4, 10_000
RULES = {"min_side": 512.0, "min_aesthetic": 5.0, "max_watermark": 0.5}


def make_metadata(folder: Path, rows: int) -> None:
    """Parquet with distinct URLs and captions, and about a quarter of the rows good."""
    for number in range(NUM_FILES):
        begin, end = rows * number // NUM_FILES, rows * (number + 1) // NUM_FILES
        duckdb.execute(
            f"""
            COPY (SELECT 'https://' || (i % 4500) || '.example.com/' || md5(i::VARCHAR) || '.jpg' AS URL,
                'a photograph of ' || md5((i + 1)::VARCHAR) || ' number ' || i AS TEXT,
                (200 + hash(i) % 1400)::INTEGER AS WIDTH, (200 + hash(i + 7) % 1400)::INTEGER AS HEIGHT,
                0.3::DOUBLE AS similarity, hash(i)::BIGINT AS hash, ((hash(i + 1) % 1000) / 1000)::FLOAT AS pwatermark,
                ((hash(i + 2) % 1000) / 1000)::FLOAT AS punsafe, (3 + (hash(i + 3) % 4000) / 1000)::FLOAT
                AS AESTHETIC_SCORE
            FROM (SELECT i::UHUGEINT % 9223372036854775807 AS i FROM range({begin}, {end}) t(i)))
            TO '{folder}/part-{number:05d}.parquet' (FORMAT parquet, COMPRESSION snappy)
            """.replace("hash(i)::BIGINT", "(hash(i) % 9223372036854775807)::BIGINT")
        )


def select_ours(metadata: Path, output: Path) -> int:
    from filters.metadata import select_rows
    from filters.recipe import SelectConfig
    from sdtrain.data.dataset import DatasetDir

    config = SelectConfig(metadata=str(metadata), rules=RULES, samples_per_shard=SAMPLES_PER_SHARD)
    return select_rows(DatasetDir(output), config).num_out


def select_duckdb(metadata: Path, output: Path) -> int:
    where = "least(WIDTH, HEIGHT) >= 512 AND AESTHETIC_SCORE > 5.0 AND pwatermark < 0.5"
    source = f"FROM read_parquet('{metadata}/*.parquet') WHERE {where}"
    copied = duckdb.execute(f"COPY (SELECT * {source}) TO '{output}.parquet' (FORMAT parquet, COMPRESSION zstd)")
    return copied.fetchone()[0]


def select_pandas(metadata: Path, output: Path) -> int:
    import pandas as pd

    table = pd.read_parquet(metadata)
    good = (table[["WIDTH", "HEIGHT"]].min(axis=1) >= 512) & (table.AESTHETIC_SCORE > 5.0) & (table.pwatermark < 0.5)
    chosen = table[good].sample(frac=1, random_state=42)
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
    return json.loads(ended.stdout.splitlines()[-1])


def be_contender(name: str, folder: Path) -> None:
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "metadata").mkdir()
        make_metadata(folder / "metadata", rows)
        results = {name: run_contender(name, folder) for name in CONTENDERS}
    assert len({result["selected"] for result in results.values()}) == 1, results
    for name, result in results.items():
        speed = rows / result["seconds"] / 1e6
        print(f"{name:12} {result['seconds']:8.2f} s {speed:8.2f} M rows/s {result['peak_rss_mb']:8.0f} MB")
    ours = results["sdtrain"]
    figures = {
        "rows": rows,
        "vs_duckdb_copy": round(results["duckdb COPY"]["seconds"] / ours["seconds"], 3),
        "vs_pandas": round(results["pandas"]["seconds"] / ours["seconds"], 2),
        "peak_rss_mb": round(ours["peak_rss_mb"]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
