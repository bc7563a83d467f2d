import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from sdtrain.dataset.layout import DatasetDir, index_path
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.encode.info import ROWS_KEY, VAE_KEY, describe_rows
from sdtrain.encode.stage import drop_latents
from sdtrain.errors import UserError
from sdtrain.loading import latent_store, shard_catalog
from sdtrain.loading.latent_store import LatentStore
from sdtrain.loading.shard_catalog import Catalogue
from tests.training_fixtures import write_latents, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def data(tmp_path, models) -> Path:
    return write_latents(tmp_path / "data", models)


@pytest.fixture
def large(monkeypatch):
    """Datasets are large from the first sample on: indexes are kept beside the tables."""
    monkeypatch.setattr(latent_store, "_SMALL", 0)


def table(uids, captions, offsets, described=True) -> pa.Table:
    digest = {ROWS_KEY: describe_rows(uids, captions, offsets)} if described else {}
    sides = [8] * len(uids)
    columns = {"uid": uids, "caption": captions, "offset": offsets, "num_bytes": [1024] * len(uids)}
    return pa.table(columns | {"height": sides, "width": sides}).replace_schema_metadata({VAE_KEY: "vae"} | digest)


def digest_of(folder: Path, rows: pa.Table) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(rows, folder / "00000.parquet", compression="zstd")
    return Catalogue(folder, [(8, 8)]).digest


def test_a_large_dataset_is_indexed_when_first_read_and_the_index_is_used_the_next_time(data, large):
    indices = np.array([3, 21, 44])
    first = LatentStore(data, 64)
    assert not list(data.rglob("*.index.*"))  # nothing is read before it is needed
    expected = first.uids(indices), first.captions(indices), first.get(indices)
    kept = sorted(data.rglob("*.index.arrow"))
    assert [path.name[:5] for path in kept] == ["00000", "00001", "00002"]
    stamps = [path.stat().st_mtime_ns for path in kept]
    second = LatentStore(data, 64)
    assert (second.uids(indices), second.captions(indices)) == expected[:2]
    np.testing.assert_array_equal(second.get(indices), expected[2])
    assert [path.stat().st_mtime_ns for path in kept] == stamps


def test_a_small_dataset_gets_no_files(data):
    before = sorted(data.rglob("*"))
    LatentStore(data, 64).get(np.array([3, 21, 44]))
    assert [path for path in sorted(data.rglob("*")) if path.name != "dataset.lock"] == before


@pytest.mark.parametrize("damage", ["other table", "cut short", "empty"])
def test_an_index_that_is_not_of_its_table_is_made_anew(data, large, damage):
    LatentStore(data, 64).uids(np.array([3]))
    kept = index_path(data / "latents" / "00000.parquet")
    if damage == "other table":
        rows = pq.read_table(data / "latents" / "00000.parquet")
        changed = rows.set_column(2, "caption", pa.array(["new"] * len(rows)))
        pq.write_table(changed, data / "latents" / "00000.parquet")
    else:
        kept.write_bytes(kept.read_bytes()[:-2000] if damage == "cut short" else b"")
    assert LatentStore(data, 64).captions(np.array([3])) == ["new" if damage == "other table" else "a red square"]


@pytest.fixture
def former(data) -> Path:
    """An index as versions before wrote it, of which nothing is true any more."""
    path = data / "latents" / "00000.index.safetensors"
    save_file({"uid": np.zeros(3, np.uint8), "uid_end": np.array([3])}, path, {"table_digest": "of an old table"})
    return path


def test_an_index_of_a_former_version_gives_way_to_one_of_today(data, large, former):
    assert LatentStore(data, 64).captions(np.array([3])) == ["a red square"]
    assert not former.exists()
    assert index_path(data / "latents" / "00000.parquet").exists()


def test_an_index_of_a_former_version_that_cannot_be_replaced_does_no_harm(data, large, former, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(f"read-only file system: {path}")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    assert LatentStore(data, 64).captions(np.array([3])) == ["a red square"]
    assert former.exists()


def test_an_index_whose_texts_lead_out_of_the_file_is_made_again(data, large):
    LatentStore(data, 64).uids(np.array([3]))
    kept = index_path(data / "latents" / "00000.parquet")
    with pa.ipc.open_stream(kept.read_bytes()) as reader:
        ends = np.frombuffer(reader.read_next_batch()["caption"].buffers()[1], np.int32)
    content = kept.read_bytes()
    assert content.count(ends.tobytes()) == 1
    kept.write_bytes(content.replace(ends.tobytes(), (ends + 10**6).tobytes()))
    assert LatentStore(data, 64).captions(np.array([3])) == ["a red square"]


def test_a_folder_that_cannot_be_written_is_read_all_the_same(data, large, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    assert LatentStore(data, 64).captions(np.array([3])) == ["a red square"]
    assert not list(data.rglob("*.index.*"))


def test_removal_takes_the_index_with_it(data, large):
    LatentStore(data, 64).uids(np.arange(50))
    former = data / "latents" / "00001.index.safetensors"
    former.write_bytes(f"{21:032x}".encode())
    dataset, gone = DatasetDir(data), f"{21:032x}"
    drop_latents(dataset.latents_table(1), {gone})
    assert not index_path(dataset.latents_table(1)).exists()
    assert not former.exists()
    assert not [path for path in (data / "latents").iterdir() if gone.encode() in path.read_bytes()]
    store = LatentStore(data, 64)
    assert len(store) == 49
    assert store.uids(np.array([20, 21])) == [f"{20:032x}", f"{22:032x}"]


def test_the_digest_tells_tables_apart_and_does_not_depend_on_when_they_were_written(tmp_path):
    rows = ["a", "b"], ["one", "two"], [0, 2048]
    same = [digest_of(tmp_path / name, table(*rows)) for name in ("1", "2")]
    assert same[0] == same[1]
    others = [
        digest_of(tmp_path / "3", table(["a", "c"], *rows[1:])),
        digest_of(tmp_path / "4", table(rows[0], ["one", "tow"], rows[2])),
        digest_of(tmp_path / "5", table(["b", "a"], *rows[1:])),
        digest_of(tmp_path / "6", table(*rows[:2], [0, 2560])),
    ]
    assert len({same[0], *others}) == 5


def test_a_checkpoint_of_before_knows_its_dataset_by_all_bytes_of_all_tables(data):
    store, content = LatentStore(data, 64), [p.read_bytes() for p in sorted((data / "latents").glob("*.parquet"))]
    assert store.has_digest(store.digest)
    assert store.has_digest(hashlib.sha256(b"".join(content)).hexdigest())
    assert not store.has_digest(hashlib.sha256(b"".join(content[:-1])).hexdigest())


def test_footers_of_many_shards_are_read_once_and_changed_ones_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_catalog, "_WORTH_KEEPING", 3)
    for shard in range(4):
        pq.write_table(table(["a", "b"], ["c", "d"], [0, shard]), tmp_path / f"{shard:05d}.parquet")
    first, read = Catalogue(tmp_path, [(8, 8)]), []
    original = shard_catalog._read
    monkeypatch.setattr(shard_catalog, "_read", lambda *args: read.append(args[0].name) or original(*args))
    assert Catalogue(tmp_path, [(8, 8)]).digest == first.digest
    assert read == []
    pq.write_table(table(["a"], ["c"], [0]), tmp_path / "00002.parquet")
    changed = Catalogue(tmp_path, [(8, 8)])
    assert read == ["00002.parquet"]
    assert changed.counts().tolist() == [[2], [2], [1], [2]]
    assert changed.digest != first.digest


def test_shards_beyond_99999_come_last(tmp_path):
    for shard in (99_999, 100_000, 7):
        pq.write_table(table(["a"], ["c"], [0]), tmp_path / f"{shard:05d}.parquet")
    tables = [shard.table for shard in Catalogue(tmp_path, [(8, 8)]).shards]
    assert tables == ["00007.parquet", "99999.parquet", "100000.parquet"]


def test_verification_compares_a_shard_with_its_digest_before_it_is_read(data):
    dataset = DatasetDir(data)
    for shard in (0, 1):
        outputs = describe_outputs(dataset, [dataset.latents_tar(shard)])
        write_entry(dataset, ShardReport(stage="encode", shard=shard, num_in=20, num_out=20, outputs=outputs))
    content = bytearray(dataset.latents_tar(1).read_bytes())
    content[5000] ^= 1
    dataset.latents_tar(1).write_bytes(content)
    store = LatentStore(data, 64, verify=True)
    store.get(np.array([0, 19]))
    with pytest.raises(UserError, match=r"00001\.tar is not what was written: its sha256 differs"):
        store.get(np.array([20]))
    with pytest.raises(UserError, match=r"00002\.tar has no digest in the manifest"):
        store.get(np.array([40]))
