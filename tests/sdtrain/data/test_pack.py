from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_fixtures import Fetched, encoded, scene_picture, write_downloads

from sdtrain.data.config import PackConfig
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.manifest import ShardReport, describe_outputs, require_entry, write_entry
from sdtrain.data.pack import PACK, write_index
from sdtrain.data.stage import pending, run_batch
from sdtrain.data.tars import read_samples
from sdtrain.errors import UserError

_DECISIONS = pa.schema([("uid", pa.string()), ("key", pa.string()), ("shard", pa.int32()), ("reason", pa.string())])


class Recipe:
    """The part of a recipe that packing reads."""

    def __init__(self, samples_per_shard: int = 5, seed: int = 42):
        self.pack = PackConfig(samples_per_shard=samples_per_shard, seed=seed)


def write_decisions(dataset: DatasetDir, dropped: set[int], fingerprint: str = "first") -> None:
    files = sorted(dataset.selection(0).parent.glob("*.parquet"))
    selected = [(shard, row) for shard, path in enumerate(files) for row in pq.read_table(path).to_pylist()]
    rows = [
        {"uid": row["uid"], "key": row["key"], "shard": shard, "reason": "min_side" if i in dropped else None}
        for i, (shard, row) in enumerate(selected)
    ]
    pq.write_table(pa.Table.from_pylist(rows, _DECISIONS), dataset.decisions)
    entry = {"stage": "keep", "shard": 0, "num_in": len(rows), "num_out": len(rows) - len(dropped)}
    entry |= {"dropped": {"min_side": len(dropped)}, "fingerprint": fingerprint}
    write_entry(
        dataset, ShardReport.model_validate(entry | {"outputs": describe_outputs(dataset, [dataset.decisions])})
    )


def make_dataset(root: Path, num_rows: int = 25, dropped: frozenset[int] = frozenset({3, 24})) -> DatasetDir:
    rows = [Fetched(encoded(scene_picture(i)), caption=None if i == 4 else f"Grüße {i}") for i in range(num_rows)]
    dataset = write_downloads(root, rows, per_shard=10)
    write_decisions(dataset, set(dropped))
    return dataset


def pack(dataset: DatasetDir, recipe: Recipe) -> list[ShardReport]:
    return run_batch(PACK, dataset, recipe, pending(PACK, dataset, recipe))


def kept_uids(dataset: DatasetDir) -> list[str]:
    return [row["uid"] for row in pq.read_table(dataset.decisions).to_pylist() if row["reason"] is None]


@pytest.fixture
def dataset(tmp_path):
    """25 pictures in three image shards, 23 of them kept."""
    return make_dataset(tmp_path)


def test_shards_hold_exactly_n_samples_the_last_the_rest_and_each_kept_one_once(dataset):
    reports = pack(dataset, Recipe(5))
    assert [report.num_out for report in reports] == [5, 5, 5, 5, 3]
    packed = [row for shard in range(5) for row in pq.read_table(dataset.packed_table(shard)).to_pylist()]
    assert sorted(row["uid"] for row in packed) == sorted(kept_uids(dataset))


def test_the_order_is_that_of_the_digest_of_uid_and_seed(dataset):
    pack(dataset, Recipe(10, seed=7))
    packed = [row["uid"] for shard in range(3) for row in pq.read_table(dataset.packed_table(shard)).to_pylist()]
    assert packed == sorted(kept_uids(dataset), key=lambda uid: hashlib.md5(f"{uid}7".encode()).hexdigest())


def test_pictures_travel_byte_for_byte_with_caption_and_provenance(dataset):
    downloaded = {key: members for shard in range(3) for key, members in read_samples(dataset.images_tar(shard))}
    pack(dataset, Recipe(5))
    packed = [sample for shard in range(5) for sample in read_samples(dataset.packed_tar(shard))]
    assert len(packed) == 23
    for key, members in packed:
        assert members["jpg"] == downloaded[key]["jpg"]
        assert members["txt"] == downloaded[key]["txt"]
        provenance = json.loads(members["json"])
        assert provenance["sha256"] == hashlib.sha256(members["jpg"]).hexdigest()
        assert provenance["key"] == key
        assert provenance["uid"] in kept_uids(dataset)
        assert provenance["url"].startswith("https://host")
        assert (provenance["original_width"], provenance["width"]) == (600, 96)


def test_the_table_says_where_each_picture_lies_in_the_tar(dataset):
    pack(dataset, Recipe(5))
    content = dataset.packed_tar(2).read_bytes()
    samples = dict(read_samples(dataset.packed_tar(2)))
    for row in pq.read_table(dataset.packed_table(2)).to_pylist():
        found = content[row["picture_offset"] : row["picture_offset"] + row["picture_bytes"]]
        assert found == samples[row["key"]][row["extension"]]


def test_packing_does_nothing_twice_and_any_order_of_shards_gives_the_same_bytes(dataset, digests):
    recipe = Recipe(5)
    pack(dataset, recipe)
    assert pending(PACK, dataset, recipe) == []
    before = digests(dataset)
    run_batch(PACK, dataset, recipe, [3, 0])
    run_batch(PACK, dataset, recipe, [4, 2, 1])
    assert digests(dataset) == before


def test_a_lost_shard_alone_is_made_again(dataset, digests):
    pack(dataset, Recipe(5))
    before = digests(dataset)
    dataset.packed_tar(1).unlink()
    assert [report.shard for report in pack(dataset, Recipe(5))] == [1]
    assert digests(dataset) == before


def test_pictures_fetched_anew_are_packed_anew_though_the_decisions_are_the_same(dataset):
    pack(dataset, Recipe(5))
    write_decisions(dataset, {3, 24}, fingerprint="of other image shards")
    assert pending(PACK, dataset, Recipe(5)) == [0, 1, 2, 3, 4]


def test_fewer_shards_leave_nothing_of_the_earlier_ones_nor_of_their_latents(dataset):
    pack(dataset, Recipe(5))
    latents = dataset.latents_tar(4)
    latents.parent.mkdir()
    for path in (latents, dataset.latents_table(4), dataset.latents_table(0), dataset.manifest_entry("encode", 4)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    pack(dataset, Recipe(10))
    left = {dataset.relative(path) for path in dataset.root.rglob("*0000[34].*") if "selection" not in path.parts}
    assert left == set()
    assert dataset.latents_table(0).exists()
    assert [shard["nsamples"] for shard in json.loads(write_index(dataset).read_text())["shardlist"]] == [10, 10, 3]


def test_the_index_lists_every_shard_as_wids_wants_it(dataset, digests):
    pack(dataset, Recipe(10))
    index = json.loads(write_index(dataset).read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [(shard["url"], shard["nsamples"]) for shard in index["shardlist"]] == [
        ("00000.tar", 10),
        ("00001.tar", 10),
        ("00002.tar", 3),
    ]
    for number, shard in enumerate(index["shardlist"]):
        content = dataset.packed_tar(number).read_bytes()
        assert (shard["filesize"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    before = digests(dataset)
    write_index(dataset)
    assert digests(dataset) == before


def test_the_index_does_not_depend_on_where_the_dataset_lies(tmp_path):
    indexes = []
    for name in ("here", "there"):
        dataset = make_dataset(tmp_path / name)
        pack(dataset, Recipe(10))
        indexes.append(write_index(dataset).read_bytes())
    assert indexes[0] == indexes[1]


def test_wids_reads_the_index_and_gives_the_samples(dataset, tmp_path):
    wids = pytest.importorskip("wids")
    pack(dataset, Recipe(10))
    index = write_index(dataset)
    (tmp_path / "cache").mkdir()
    packed = wids.ShardListDataset(str(index), base=str(index.parent), keep=True, cache_dir=str(tmp_path / "cache"))
    assert len(packed) == 23
    assert packed[22]["__key__"] == list(read_samples(dataset.packed_tar(2)))[2][0]


def test_webdataset_reads_the_shards_in_order(dataset):
    webdataset = pytest.importorskip("webdataset")
    pack(dataset, Recipe(10))
    urls = [str(dataset.packed_tar(shard)) for shard in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json"))
    assert [key for key, *_ in samples] == [key for url in urls for key, _ in read_samples(Path(url))]
    assert all(picture.size == (96, 80) and described["key"] == key for key, picture, described in samples)


def test_a_damaged_image_shard_is_named(dataset):
    tar = dataset.images_tar(1)
    tar.write_bytes(tar.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"00001\.tar is damaged or cut short"):
        pack(dataset, Recipe(5))


def test_before_keep_has_finished_there_is_a_sentence(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(b"x")])
    with pytest.raises(UserError, match="stage 'keep' is not finished"):
        PACK.shards(dataset, Recipe())


def test_the_report_counts_what_was_packed(dataset):
    pack(dataset, Recipe(50))
    entry = require_entry(dataset, "pack", 0)
    assert (entry.num_in, entry.num_out, entry.dropped) == (23, 23, {})
