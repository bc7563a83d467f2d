from __future__ import annotations

import hashlib
import json
import random
import shutil
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.score.preprocess import RequiredViews, preprocess, read_shard
from sdtrain.dataset.config import CaptionConfig, PackConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, require_entry, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.dataset.tars import read_samples
from sdtrain.errors import UserError
from sdtrain.images.crops import resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.loading.image_store import ImageStore
from sdtrain.pack import plan
from sdtrain.pack.plan import planned
from sdtrain.pack.stage import PACK, SourceTars, write_index
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

_DECISIONS = pa.schema([("uid", pa.string()), ("key", pa.string()), ("shard", pa.int32()), ("reason", pa.string())])


class Recipe:
    """The part of a recipe that packing reads."""

    def __init__(self, samples_per_shard: int = 5, seed: int = 42):
        self.caption = CaptionConfig()
        self.pack = PackConfig(samples_per_shard=samples_per_shard, seed=seed)


def write_decisions(dataset: DatasetDir, dropped: set[int], fingerprint: str = "first") -> None:
    files = sorted(dataset.selection(0).parent.glob("*.parquet"))
    selected = [(shard, row) for shard, path in enumerate(files) for row in pq.read_table(path).to_pylist()]
    rows = [
        {"uid": row["uid"], "key": row["key"], "shard": shard, "reason": "min_side" if i in dropped else None}
        for i, (shard, row) in enumerate(selected)
    ]
    pq.write_table(pa.Table.from_pylist(rows, _DECISIONS), dataset.decisions)
    entry = {"stage": "decide", "shard": 0, "num_in": len(rows), "num_out": len(rows) - len(dropped)}
    entry |= {"dropped": {"min_side": len(dropped)}, "fingerprint": fingerprint}
    write_entry(
        dataset, ShardReport.model_validate(entry | {"outputs": describe_outputs(dataset, [dataset.decisions])})
    )


def make_dataset(root: Path, num_rows: int = 25, dropped: frozenset[int] = frozenset({3, 24})) -> DatasetDir:
    rows = [Fetched(encoded(scene_image(i)), caption=None if i == 4 else f"Grüße {i}") for i in range(num_rows)]
    dataset = write_downloads(root, rows, per_shard=10)
    write_decisions(dataset, set(dropped))
    return dataset


def pack(dataset: DatasetDir, recipe: Recipe) -> list[ShardReport]:
    return run_batch(PACK, dataset, recipe, pending(PACK, dataset, recipe))


def kept_uids(dataset: DatasetDir) -> list[str]:
    return [row["uid"] for row in pq.read_table(dataset.decisions).to_pylist() if row["reason"] is None]


FORMATS = ("avif", "jpg", "webp", "avif", "png", "avif")


def test_images_of_every_format_are_read_by_all_later_stages(tmp_path):
    """An extension sorts before or behind the other members, which moves the places that training reads."""
    forms = [form.replace("jpg", "jpeg") for form in FORMATS]
    images = [encoded(scene_image(i), form) for i, form in enumerate(forms)]
    rows = [Fetched(image, extension=form) for image, form in zip(images, FORMATS, strict=True)]
    dataset = write_downloads(tmp_path, rows)
    views = [preprocess(sample, RequiredViews(clip=None, watermark=True)) for sample in read_shard(dataset, 0)]
    assert not any(view.is_damaged for view in views)
    write_decisions(dataset, set())
    pack(dataset, Recipe(samples_per_shard=10))
    packed = dict(read_samples(dataset.packed_tar(0)))
    assert sorted(image_extension(members) for members in packed.values()) == sorted(FORMATS)
    assert sorted(members[image_extension(members)] for members in packed.values()) == sorted(images)
    store = ImageStore(dataset.root, 64, encoder=None)
    pixels, everyone = store.buffer(len(FORMATS), 0), np.arange(len(FORMATS))
    store.fetch(everyone, np.zeros_like(everyone), 0, pixels).require_whole()
    for read, members in zip(pixels, packed.values(), strict=True):
        place = seeded_uniform("crop", 0, json.loads(members["json"])["uid"], 0)
        expected = resize_and_crop(decode_rgb(members[image_extension(members)]), (64, 64), place).pixels
        assert np.array_equal(read.transpose(1, 2, 0), expected)


@pytest.fixture
def dataset(tmp_path):
    """25 images in three image shards, 23 of them kept."""
    return make_dataset(tmp_path)


def test_shards_hold_exactly_n_samples_the_last_the_rest_and_each_kept_one_once(dataset):
    reports = pack(dataset, Recipe(5))
    assert [report.num_out for report in reports] == [5, 5, 5, 5, 3]
    packed = [row for shard in range(5) for row in pq.read_table(dataset.packed_table(shard)).to_pylist()]
    assert sorted(row["uid"] for row in packed) == sorted(kept_uids(dataset))


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 23),
    dropped=st.sets(st.integers(0, 22), max_size=12),
    samples_per_shard=st.integers(1, 9),
    seed=st.integers(0, 2**40),
)
def test_what_is_packed_comes_out_again_byte_for_byte_whatever_the_settings(num_rows, dropped, samples_per_shard, seed):
    with TemporaryDirectory() as folder:
        rows = [Fetched(content_of(i), caption=None if i == 4 else f" Grüße\r\n{i}\t ") for i in range(num_rows)]
        dataset, dropped = write_downloads(Path(folder), rows, per_shard=4), dropped & set(range(num_rows))
        write_decisions(dataset, dropped)
        reports = pack(dataset, Recipe(samples_per_shard, seed))
        packed = [dict(read_samples(dataset.packed_tar(shard))) for shard in range(len(reports))]
        fetched = {k: members for tar in (Path(folder) / "images").glob("*.tar") for k, members in read_samples(tar)}
        kept = {row["key"] for row in pq.read_table(dataset.decisions).to_pylist() if row["reason"] is None}
    unpacked = {key: members for shard in packed for key, members in shard.items()}
    assert sum(map(len, packed)) == len(unpacked)
    assert unpacked.keys() == kept
    assert all(unpacked[key][kind] == fetched[key][kind] for key in kept for kind in ("jpg", "txt"))
    assert [len(shard) for shard in packed[:-1]] == [samples_per_shard] * (len(packed) - 1)


def content_of(number: int) -> bytes:
    """Bytes of any length; packing does not look at them."""
    return random.Random(number).randbytes(number * 173 % 2000)


def test_few_files_are_open_however_many_shards_are_read_from(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(content_of(i)) for i in range(30)], per_shard=1)
    write_decisions(dataset, set())
    rows = planned(dataset, Recipe(30).pack, 0)
    with closing(SourceTars(dataset, max_open=3)) as tars:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for row, image in tars.read([*rows, *rows]):
            assert hashlib.sha256(image).hexdigest() == row["sha256"]
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_an_image_shard_that_is_missing_is_named(dataset):
    dataset.images_tar(1).unlink()
    with pytest.raises(UserError, match=r"There is no file .*images/00001\.tar.* Run the build again"):
        pack(dataset, Recipe(5))
    assert not list(dataset.root.rglob(".*"))


def test_a_table_that_is_not_of_its_tar_is_noticed(dataset):
    shutil.copy(dataset.images_tar(0), dataset.images_tar(1))
    with pytest.raises(UserError, match=r"00001\.tar is damaged or cut short: the image of \d+ is not where"):
        pack(dataset, Recipe(5))


def test_the_plan_is_made_once_and_again_when_the_decisions_are_others(dataset):
    pack(dataset, Recipe(5))
    made = dataset.pack_plan.stat().st_mtime_ns
    run_batch(PACK, dataset, Recipe(5), [2])
    assert dataset.pack_plan.stat().st_mtime_ns == made
    write_decisions(dataset, {0, 1, 2}, fingerprint="second")
    assert [report.num_out for report in pack(dataset, Recipe(10))] == [10, 10, 2]
    assert dataset.pack_plan.stat().st_mtime_ns != made


def test_tables_of_before_images_had_a_place_are_a_sentence(dataset):
    for path in (dataset.root / "images").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["picture_offset"]), path)
    with pytest.raises(UserError, match="of an older version, delete the folder"):
        pack(dataset, Recipe(5))


def test_the_order_is_that_of_the_digest_of_uid_and_seed(dataset):
    pack(dataset, Recipe(10, seed=7))
    packed = [row["uid"] for shard in range(3) for row in pq.read_table(dataset.packed_table(shard)).to_pylist()]
    assert packed == sorted(kept_uids(dataset), key=lambda uid: hashlib.md5(f"{uid}7".encode()).hexdigest())


def test_images_travel_byte_for_byte_with_caption_and_provenance(dataset):
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


def test_the_table_says_where_each_image_lies_in_the_tar(dataset):
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


def test_images_fetched_anew_are_packed_anew_though_the_decisions_are_the_same(dataset):
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


def test_cost_of_a_batch_does_not_grow_with_the_number_of_shards(dataset, monkeypatch):
    read, listed, read_metadata, glob = [], [], pq.read_metadata, Path.glob
    monkeypatch.setattr(plan.pq, "read_metadata", lambda path: (read.append(path), read_metadata(path))[1])
    monkeypatch.setattr(Path, "glob", lambda path, pattern: (listed.append(path), glob(path, pattern))[1])
    for shard in pending(PACK, dataset, Recipe(2)):
        run_batch(PACK, dataset, Recipe(2), [shard])
    assert len(list(dataset.packed_tar(0).parent.glob("*.tar"))) == 12
    assert read == [dataset.pack_plan], "the plan's footer, once"
    assert listed.count(dataset.manifest_entry("pack", 0).parent) == 1


def test_plan_made_anew_is_read_anew(dataset):
    pack(dataset, Recipe(5))
    write_decisions(dataset, {0, 1, 2}, fingerprint="others")
    pack(dataset, Recipe(5))
    packed = [key for path in dataset.packed_table(0).parent.glob("*.parquet") for key in keys_of(path)]
    reasons = dict(zip(keys_of(dataset.decisions), pq.read_table(dataset.decisions)["reason"].to_pylist(), strict=True))
    assert sorted(packed) == sorted(key for key, reason in reasons.items() if reason is None)


def keys_of(table: Path) -> list[str]:
    return pq.read_table(table)["key"].to_pylist()


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


def test_wids_reads_the_index_and_gives_every_sample(dataset, tmp_path):
    wids = pytest.importorskip("wids")
    pack(dataset, Recipe(10))
    index = write_index(dataset)
    (tmp_path / "cache").mkdir()
    packed = wids.ShardListDataset(str(index), base=str(index.parent), keep=True, cache_dir=str(tmp_path / "cache"))
    expected = [key for shard in range(3) for key, _ in read_samples(dataset.packed_tar(shard))]
    assert [packed[place]["__key__"] for place in range(len(packed))] == expected


def test_webdataset_reads_the_shards_of_the_index_in_order(dataset):
    webdataset = pytest.importorskip("webdataset")
    pack(dataset, Recipe(10))
    index = write_index(dataset)
    urls = [str(index.parent / shard["url"]) for shard in json.loads(index.read_text())["shardlist"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json"))
    assert [key for key, *_ in samples] == [key for url in urls for key, _ in read_samples(Path(url))]
    assert all(image.size == (96, 80) and described["key"] == key for key, image, described in samples)


def test_a_damaged_image_shard_is_named(dataset):
    tar = dataset.images_tar(1)
    tar.write_bytes(tar.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"00001\.tar is damaged or cut short"):
        pack(dataset, Recipe(5))


def test_before_keep_has_finished_there_is_a_sentence(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(b"x")])
    with pytest.raises(UserError, match="stage 'decide' is not finished"):
        PACK.shards(dataset, Recipe())


def test_the_report_counts_what_was_packed(dataset):
    pack(dataset, Recipe(50))
    entry = require_entry(dataset, "pack", 0)
    assert (entry.num_in, entry.num_out, entry.dropped) == (23, 23, {})
