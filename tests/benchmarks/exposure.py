"""The steps that used a sample out of 10^9 in 132,000 shards, and what a run records for it.

    python -m tests.benchmarks.exposure

The dataset has one real shard, as only those of the samples in question are opened. Finding samples by uid reads all
tables; that is timed apart, on shards whose number is the second figure.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters.exposure.find import Search
from sdtrain.config import TrainConfig, load_config
from sdtrain.dataset.layout import DatasetDir
from sdtrain.exposure.exposures import find_exposures
from sdtrain.exposure.located import present_as_located
from sdtrain.loading.order import BlockOrder, GlobalOrder
from sdtrain.loading.sample_plan import SamplePlan, SourcePlan
from sdtrain.loading.sample_record import RecordedSource, SampleRecord
from sdtrain.loading.shard_catalog import footer_digest
from sdtrain.settings import parse_settings
from sdtrain.training.run_dir import RunDir

NUM_SHARDS, ROWS, BATCH = 132_000, 7_576, 2_048
SCANNED = 100
ResultT = TypeVar("ResultT")


def timed(what: str, work: Callable[[], ResultT]) -> ResultT:
    """Prints the seconds that some work takes."""
    began = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - began:.3f} s", flush=True)
    return result


def invert() -> None:
    """The plan alone."""
    for name, order in (
        ("global", GlobalOrder(NUM_SHARDS * ROWS, 1)),
        ("blocks", BlockOrder(np.full(NUM_SHARDS, ROWS), 64, 1)),
    ):
        plan, size = SamplePlan([SourcePlan((order,))], BATCH), order.size
        timed(f"plan, {name}: one sample, 3 epochs", lambda: plan.find(np.array([123_456_789]), 3 * size))  # noqa: B023
        many = np.arange(100_000) * 9_999
        timed(f"plan, {name}: 100,000 samples, 3 epochs", lambda: plan.find(many, 3 * size))  # noqa: B023


def write_table(path: Path, first: int) -> None:
    """A shard's table as encoding writes it, but for its latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + ROWS)
    columns = {
        "uid": [f"{number * 2654435761 % 2**128:032x}" for number in numbers],
        "caption": [f"a photo of number {number}" for number in numbers],
        "url": [f"https://host-{number % 97}.example/{number}.jpg" for number in numbers],
        "height": pa.array([64] * ROWS, pa.int32()),
        "width": pa.array([64] * ROWS, pa.int32()),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def whole_answer(folder: Path) -> None:
    """Record and answer of a run on all shards."""
    table, run = folder / "data" / "latents" / "00077.parquet", folder / "run"
    write_table(table, 77 * ROWS)
    tables = tuple(f"{number:05d}.parquet" for number in range(NUM_SHARDS))
    digests = tuple(
        footer_digest(table) if name == table.name else hashlib.sha256(name.encode()).hexdigest() for name in tables
    )
    source = RecordedSource(str(folder / "data"), tables, digests, np.full((NUM_SHARDS, 1), ROWS))
    record, config = SampleRecord("encode", ((64, 64),), (source,)), config_of(folder)
    run.mkdir()
    RunDir(run).begin(config, 0)
    timed("record: written", lambda: record.write(RunDir(run).samples))
    print(f"record: {RunDir(run).samples.stat().st_size / 1e6:.1f} MB")
    (run / "DONE").write_text(f'{{"step": {config.steps}}}')
    rows = pq.read_table(table, columns=["uid", "url", "caption"]).slice(1234, 1)
    named = rows.append_column("table", pa.array([table.name])).append_column("row", pa.array([1234]))
    found = timed(
        "answer: one sample, from the record on",
        lambda: find_exposures(run, lambda dataset, stage: present_as_located(dataset, named)),
    )
    print(f"answer: {len(found.uses)} uses")


def config_of(folder: Path) -> TrainConfig:
    """SD v1's first run, for three epochs."""
    content = load_config("sd-v1-1-256").model_dump()
    content |= {"steps": 3 * NUM_SHARDS * ROWS // BATCH, "init_from": None}
    content["data"] |= {"root": str(folder / "data"), "sources": ()}
    return parse_settings(TrainConfig, content, "benchmark")


def scan(folder: Path) -> None:
    """The search for a uid."""
    dataset = DatasetDir(folder / "scanned")
    for number in range(SCANNED):
        write_table(dataset.latents_table(number), number * ROWS)
    uid = pq.read_table(dataset.latents_table(50), columns=["uid"])["uid"][7].as_py()
    url = pq.read_table(dataset.latents_table(50), columns=["url"])["url"][7].as_py()
    hosts = [f"host-{number}.example" for number in range(90, 100_000)]
    for what, by, entries in (
        ("a uid", "uid", [uid]),
        ("a URL", "url", [url]),
        ("a host", "host", ["host-5.example"]),
        ("1,000 hosts", "host", hosts[:1000]),
        ("1,001 hosts", "host", hosts[:1001]),
    ):
        began = time.process_time()
        found = timed(f"search by {what} in {SCANNED} shards", lambda: Search(by, entries)(dataset, "encode"))  # noqa: B023
        per_million = (time.process_time() - began) / (SCANNED * ROWS / 1e6)
        print(f"found {len(found):,}; processor time of a million rows: {per_million:.2f} s")


def main() -> None:
    """Prints all figures."""
    invert()
    with TemporaryDirectory() as folder:
        whole_answer(Path(folder))
        scan(Path(folder))


if __name__ == "__main__":
    main()
