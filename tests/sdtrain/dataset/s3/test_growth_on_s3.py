"""Requests and calls of the commands on finished datasets in a bucket grow no faster than the number of shards."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.dataset.files import sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import forget_entry
from sdtrain.dataset.open import dataset_at, training_root
from sdtrain.dataset.s3.url import parse_url
from tests.benchmarks import scale_world
from tests.benchmarks.scale_world import real_uids, write_world
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET
from tests.sdtrain.dataset.s3.test_requests import counted

SIZES = (10, 30, 50)
SECOND_BUILD = 25
"""Requests of a second build, however large the dataset: docs/object-storage.md says so."""


@dataclass(frozen=True)
class Costs:
    """Of one command."""

    requests: int
    calls: int


def cost_of(*arguments: object) -> Costs:
    with counted() as requests, cProfile.Profile() as profile:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return Costs(requests.total(), pstats.Stats(profile).total_calls)


def upload(store, dataset: DatasetDir, prefix: str) -> None:
    def put(path: Path) -> None:
        extra = {"Metadata": {"sha256": sha256_of(path)}}
        store.client.upload_file(str(path), BUCKET, f"{prefix}/{dataset.relative(path)}", ExtraArgs=extra)

    local = {dataset.database, dataset.lock, dataset.pack_plan}
    paths = [path for path in dataset.root.rglob("*") if path.is_file() and path not in local]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, [path for path in paths if path.parent.name != "manifest"]))


def real_shard(dataset: DatasetDir) -> int:
    """A packed shard with real images."""
    tables = dataset.packed_table(0).parent.glob("*.parquet")
    uid = real_uids(dataset)[0]
    return next(int(path.stem) for path in tables if uid in pq.read_table(path)["uid"].to_pylist())


def costs_of(store, folder: Path, num_shards: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Costs]]:
    """The commands in an order that leaves each what it needs."""
    world = write_world(folder, num_shards)
    url = f"s3://{BUCKET}/growth-{num_shards}"
    upload(store, world.dataset, parse_url(url).prefix)
    build = ("build", world.dataset.recipe, "--output", url, "--no-keep-local")
    yield "first build of another machine", cost_of(*build)
    yield "second build", cost_of(*build)
    yield "status", cost_of("status", url)
    here = dataset_at(url)
    with lock_to_change(here, "sdtrain remove"):
        forget_entry(here, "encode", real_shard(world.dataset))
    yield "build of one missing shard", cost_of(*build)
    for command in (("status",), ("query", "SELECT count(*) FROM images"), ("decide", "--dry-run")):
        monkeypatch.setenv("SDTRAIN_WORK_DIR", str(folder / command[0]))
        yield f"{command[0]} on an empty machine", cost_of(command[0], url, *command[1:])
    monkeypatch.setenv("SDTRAIN_WORK_DIR", str(folder / "training"))
    with counted() as requests, cProfile.Profile() as profile:
        training_root(url)
    yield "start of training on an empty machine", Costs(requests.total(), pstats.Stats(profile).total_calls)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_command_asks_the_bucket_more_than_by_the_shard(store, tmp_path, monkeypatch):
    monkeypatch.setattr(scale_world, "_TAR_BYTES", 20_000)
    monkeypatch.setattr(scale_world, "NUM_REAL", 4)
    dict(costs_of(store, tmp_path / "warm", 3, monkeypatch))  # imports, and what is cached for the process
    costs = {num: dict(costs_of(store, tmp_path / str(num), num, monkeypatch)) for num in SIZES}
    for command in costs[SIZES[0]]:
        few, more, most = (costs[num][command] for num in SIZES)
        steps = more.requests - few.requests, most.requests - more.requests
        print(command, few, more, most)
        assert steps[1] <= 1.1 * max(steps[0], 0) + 5, (command, steps)
        assert most.calls - more.calls < 1.3 * max(more.calls - few.calls, 0) + 0.1 * few.calls, (command, few, more)
    for command in ("second build", "status", "status on an empty machine"):
        assert costs[SIZES[0]][command].requests == costs[SIZES[-1]][command].requests <= SECOND_BUILD
