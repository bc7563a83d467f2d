"""latents/info.json names the first finished shard's quality, however many shards there are, without listing them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.encode import info
from sdtrain.encode.info import CHECK_KEY, write_info


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetDir:
    """Without a VAE, of which nothing is asked here."""
    monkeypatch.setattr(info, "latents_info", lambda dataset, config: {"schema_version": 1})
    (tmp_path / "latents").mkdir()
    return DatasetDir(tmp_path)


@pytest.fixture
def num_listings(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a folder was listed since the test began."""
    listed: list[Any] = []

    def scandir(*arguments: Any) -> Any:
        listed.append(arguments)
        return to_the_end(*arguments)

    to_the_end = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    return lambda: len(listed)


def finish(dataset: DatasetDir, shard: int, psnr_db: float | None) -> None:
    """Writes a shard's table, with the quality of its check if it has one, and then the info."""
    metadata = {} if psnr_db is None else {CHECK_KEY: json.dumps({"psnr_db": psnr_db})}
    pq.write_table(pa.table({"uid": ["a"]}).replace_schema_metadata(metadata), dataset.latents_table(shard))
    write_info(dataset, EncodeConfig(vae="none"), shard)


def stated(dataset: DatasetDir) -> Any:
    return json.loads(dataset.latents_info.read_text()).get("check")


def of_the_first(dataset: DatasetDir) -> Any:
    """From a listing of all tables."""
    first = min(dataset.latents_info.parent.glob("[0-9]*.parquet"), key=lambda path: int(path.stem))
    found = (pq.read_schema(first).metadata or {}).get(CHECK_KEY.encode())
    return {"shard": first.stem, **json.loads(found)} if found else None


@pytest.mark.parametrize("seed", range(6))
def test_quality_is_the_first_shards_in_whatever_order_they_finish(seed: int, dataset: DatasetDir) -> None:
    chance, shards = random.Random(seed), [0, 1, 2, 3, 7, 99_999, 100_000]
    chance.shuffle(shards)
    for shard in [*shards, *shards[:2]]:  # two are made again
        finish(dataset, shard, chance.choice([None, chance.uniform(20, 30)]))
        assert stated(dataset) == of_the_first(dataset)


def test_number_of_listings_does_not_grow_with_the_shards(dataset: DatasetDir, num_listings: Callable[[], int]) -> None:
    for shard in range(30, 0, -1):
        finish(dataset, shard, 20.0 + shard)
    assert num_listings() == 1
    assert stated(dataset) == {"shard": "00001", "psnr_db": 21.0}
    finish(dataset, 0, None)
    finish(dataset, 31, 50.0)
    assert num_listings() == 1
    assert stated(dataset) is None


def test_recorded_shard_that_is_gone_is_replaced_by_the_first_of_those_there(dataset: DatasetDir) -> None:
    for shard in (3, 5, 8):
        finish(dataset, shard, float(shard))
    dataset.latents_table(3).unlink()
    finish(dataset, 8, 8.0)
    assert stated(dataset) == {"shard": "00005", "psnr_db": 5.0}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"check": null}', '{"check": {"shard": "x"}}'])
def test_damaged_info_is_written_again(content: str, dataset: DatasetDir) -> None:
    finish(dataset, 4, 4.0)
    dataset.latents_info.write_text(content)
    finish(dataset, 6, 6.0)
    assert stated(dataset) == {"shard": "00004", "psnr_db": 4.0}
