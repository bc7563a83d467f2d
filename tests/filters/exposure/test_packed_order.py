"""A sample is found in a few reads among any number of shards, which lie in the order that packing gives them."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.exposure.packed_order import _place, shards_holding
from filters.recipe_record import read_recipe
from sdtrain.dataset.manifest import entries

SEED = 42


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """300 shards of two samples, some of them emptied by removals, and the uids left in each."""
    folder = tmp_path_factory.mktemp("latents")
    uids = sorted((f"{number:032x}" for number in range(600)), key=lambda uid: _place(uid, SEED))
    held = [[] if shard % 7 == 3 or shard in (0, 299) else uids[2 * shard : 2 * shard + 2] for shard in range(300)]
    paths = [folder / f"{shard:05d}.parquet" for shard in range(300)]
    for path, own in zip(paths, held, strict=True):
        pq.write_table(pa.table({"uid": pa.array(own, pa.string())}), path)
    return paths, held


def test_every_sample_is_found_in_its_shard(shards):
    paths, held = shards
    for path, own in list(zip(paths, held, strict=True))[::6]:
        for uid in own:
            assert shards_holding(paths, [uid], SEED) == [path]
    assert shards_holding(paths, [*held[1], held[200][1]], SEED) == [paths[1], paths[200]]


def test_the_reads_grow_with_the_logarithm_of_the_shards(shards, monkeypatch):
    paths, held = shards
    read, original = set(), pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **options: read.add(path) or original(path, **options))
    assert shards_holding(paths, [held[123][0]], SEED)
    assert len(read) <= 2 * math.ceil(math.log2(300)) + 1


def test_the_order_is_that_of_the_numbers_also_where_names_are_longer(shards, tmp_path):
    paths, held = shards
    renamed = [tmp_path / f"{99_900 + number:05d}.parquet" for number in range(len(paths))]
    for path, new in zip(paths, renamed, strict=True):
        new.symlink_to(path)
    for number in (99, 110, 250):
        assert shards_holding(sorted(renamed), [held[number][0]], SEED) == [renamed[number]]


@pytest.mark.parametrize(("uids", "seed"), [(["f" * 32], SEED), ([f"{7:032x}", f"{8:032x}"], 41)])
def test_what_is_not_found_in_order_is_left_to_a_look_into_all(shards, uids, seed):
    assert shards_holding(shards[0], uids, seed) is None
    assert shards_holding([], uids, seed) is None


def test_a_real_build_packs_in_this_order(photo_dataset):
    seed = read_recipe(photo_dataset).pack.seed
    paths = [photo_dataset.latents_table(entry.shard) for entry in entries(photo_dataset, "encode")]
    for path in paths:
        for uid in pq.read_table(path)["uid"].to_pylist():
            assert shards_holding(paths, [uid], seed) == [path]
