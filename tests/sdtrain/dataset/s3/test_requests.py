"""A second build of a dataset in a bucket asks nothing by the shard, and still sees what other machines did."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3 import manifest_copy
from sdtrain.dataset.s3.manifest_copy import SEAL
from sdtrain.dataset.s3.mirror import Mirror, mirror_of
from sdtrain.dataset.s3.store import _client
from sdtrain.dataset.s3.url import parse_url
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.dataset.stage import Stage, begin, pending, plain_stage, run_batch
from sdtrain.dataset.sync import fetch_shard_file, keep_local
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET

FEW, MORE = 50, 550
"""Their difference is the 500 shards for which a second build may ask once."""
FOLDERS = ("images", "scores")


def content_of(folder: str, shard: int) -> bytes:
    return f"{folder} {shard}".encode()


def report(folder: str, shard: int, fingerprint: str = "one") -> ShardReport:
    content = content_of(folder, shard)
    output = Output(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    outputs = {f"{folder}/{shard:05d}.tar": output}
    return ShardReport(stage=folder, shard=shard, fingerprint=fingerprint, num_in=1, num_out=1, outputs=outputs)


def make(folder: str, num_shards: int, fingerprint: str = "one") -> Stage[None]:
    def run(dataset: DatasetDir, recipe: None, shards: Sequence[int]) -> Iterator[ShardReport]:
        for shard in shards:
            path = dataset.root / folder / f"{shard:05d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content_of(folder, shard))
            yield report(folder, shard, fingerprint)

    return plain_stage(folder, lambda *_: list(range(num_shards)), lambda *_: fingerprint, run)


def build(dataset: DatasetDir, num_shards: int, fingerprint: str = "one") -> dict[str, list[int]]:
    """What a build does with its stages, without keeping their tars here; returns the shards made, by stage."""
    made = {}
    with lock_to_change(dataset, "sdtrain build"):
        keep_local(dataset, kept=False)
        for stage in (make(folder, num_shards, fingerprint) for folder in FOLDERS):
            begin(stage, dataset)
            if shards := pending(stage, dataset, None):
                made[stage.name] = shards
                run_batch(stage, dataset, None, shards)
    return made


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests within the block, by kind."""

    seen = Counter[str]()
    events = _client(os.getpid()).meta.events

    def count(event_name: str, **_: object) -> None:
        seen[event_name.rpartition(".")[2]] += 1

    events.register("before-send.s3", count)
    yield seen
    events.unregister("before-send.s3", count)


def put_shards(store, prefix: str, shards: range) -> None:
    """As an earlier version of sdtrain left them."""

    def put(shard: int) -> None:
        for folder in FOLDERS:
            bodies = {
                f"{folder}/{shard:05d}.tar": content_of(folder, shard),
                f"manifest/{folder}/{shard:05d}.json": report(folder, shard).model_dump_json().encode(),
            }
            for name, body in bodies.items():
                sha256 = hashlib.sha256(body).hexdigest()
                key, metadata = f"{prefix}/{name}", {"sha256": sha256}
                store.client.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata=metadata)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(put, shards))


@pytest.fixture
def machine(store, tmp_path):
    """A function that gives the dataset as a machine of that name has it."""
    return lambda name: dataset_at(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / name)


@pytest.mark.slow
def test_a_second_build_and_questions_ask_nothing_by_the_shard(store, machine, monkeypatch):
    here, asked = machine("here"), {}
    prefix = parse_url(here.url).prefix
    put_shards(store, prefix, range(FEW))
    for num, more in ((FEW, None), (MORE, range(FEW, MORE))):
        if more:
            put_shards(store, prefix, more)
            store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{SEAL}")  # as an sdtrain does that adds shards
        with counted() as first:
            assert build(here, num) == {}
        with counted() as second:
            assert build(here, num) == {}
        with counted() as empty:
            mirror_of(machine(f"empty {num}")).sync()
        store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/images/00007.tar")
        store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{SEAL}")
        with counted() as missing:
            assert build(machine(f"another {num}"), num) == {"images": [7]}
        asked[num] = {"first": first, "second": second, "empty": empty, "missing": missing}
    print(asked)
    few, more = ({command: count.total() for command, count in asked[num].items()} for num in (FEW, MORE))
    num_gets = asked[MORE]["first"]["GetObject"] - asked[FEW]["first"]["GetObject"]
    assert num_gets <= 2 * (MORE - FEW) + 2, "of an earlier version, each new entry is read once"
    assert more["second"] == few["second"] <= 25, asked
    assert more["empty"] == few["empty"] <= 10, asked
    assert more["missing"] - few["missing"] <= 12, asked  # pages of two listings


def test_what_another_machine_wrote_replaced_or_deleted_is_seen_although_there_was_a_seal(machine):
    here, there = machine("here"), machine("there")
    build(here, 4)
    assert build(there, 4) == {}
    assert build(here, 5, "two") == {folder: [0, 1, 2, 3, 4] for folder in FOLDERS}
    assert build(there, 5, "two") == {}
    with lock_to_change(here, "sdtrain remove"):
        mirror_of(here).discard(here.manifest_entry("scores", 3))
    assert [entry.shard for entry in entries(there, "scores")] == [0, 1, 2, 3, 4]
    mirror_of(there).sync()
    assert [entry.shard for entry in entries(there, "scores")] == [0, 1, 2, 4]
    assert build(there, 5, "two") == {"scores": [3]}
    assert build(here, 5, "two") == {}


def test_a_command_that_failed_or_works_leaves_no_seal(store, machine):
    here, prefix = machine("here"), parse_url(machine("here").url).prefix
    build(here, 2)
    assert SEAL in store.objects(prefix)

    def fail(report: ShardReport) -> None:
        assert SEAL not in store.objects(prefix)
        raise KeyError

    with pytest.raises(KeyError), lock_to_change(here, "sdtrain build"):
        run_batch(make("images", 3), here, None, [2], fail)
    assert SEAL not in store.objects(prefix)
    assert build(machine("there"), 3) == {"scores": [2]}
    assert SEAL in store.objects(prefix)


def test_a_worker_that_served_an_earlier_command_breaks_the_next_ones_seal_too(store, machine, monkeypatch):
    here = machine("here")
    build(here, 1)
    worker = Mirror(here, parse_url(here.url))
    for shard in (1, 2):
        with lock_to_change(here, "sdtrain build") as lock, monkeypatch.context() as elsewhere:
            token = mirror_of(here).lock_token
            elsewhere.setattr("sdtrain.dataset.storage.mirror_of", lambda _: worker)
            run_batch(make("images", 3), here, None, [shard], lock_token=token)
            assert SEAL not in store.objects(worker.store.url.prefix)
        assert lock.remote is not None
        assert SEAL in store.objects(worker.store.url.prefix)
    there = machine("there")
    mirror_of(there).sync()
    assert len(entries(there, "images")) == 3


def test_an_output_that_was_deleted_by_hand_is_missed_when_it_is_read_and_then_made_again(store, machine):
    here = machine("here")
    build(here, 3)
    url = parse_url(here.url)
    store.client.delete_object(Bucket=BUCKET, Key=url.key("images/00001.tar"))
    assert build(here, 3) == {}, "the seal says that it is there"
    with pytest.raises(UserError, match=r"it is not there\. Run the build again"):
        fetch_shard_file(here.root, here.images_tar(1), "images")
    assert build(here, 3) == {"images": [1]}
    store.client.delete_object(Bucket=BUCKET, Key=url.key("images/00002.tar"))
    with pytest.raises(FileNotFoundError):
        mirror_of(here).read_part(here.images_tar(2), 0, 3)
    assert build(here, 3) == {"images": [2]}
    store.client.delete_object(Bucket=BUCKET, Key=url.key("images/00000.tar"))
    store.client.delete_object(Bucket=BUCKET, Key=url.key(SEAL))  # as the documentation says
    assert build(here, 3) == {"images": [0]}


def test_nothing_is_sealed_while_an_output_is_missing(store, machine):
    here = machine("here")
    build(here, 2)
    url = parse_url(here.url)
    store.client.delete_object(Bucket=BUCKET, Key=url.key("scores/00001.tar"))
    store.client.delete_object(Bucket=BUCKET, Key=url.key(SEAL))
    with lock_to_change(here, "sdtrain decide"):
        pass
    assert SEAL not in store.objects(url.prefix)
    assert build(here, 2) == {"scores": [1]}
    assert SEAL in store.objects(url.prefix)


@pytest.mark.parametrize("body", [None, b"no table"])
def test_a_table_that_was_deleted_or_damaged_costs_a_listing_and_is_stored_again(store, machine, body):
    build(machine("here"), 3)
    url = parse_url(machine("here").url)
    store.client.delete_object(Bucket=BUCKET, Key=url.key("manifest/images.parquet"))
    if body:
        store.client.put_object(Bucket=BUCKET, Key=url.key("manifest/images.parquet"), Body=body)
    asking = machine("asking")
    mirror_of(asking).sync()
    assert len(entries(asking, "images")) == 3
    assert build(machine("there"), 3) == {}
    with counted() as seen:
        mirror_of(machine("another")).sync()
    assert seen["ListObjectsV2"] == 2, "those of the files at the top, so a seal holds again"


def test_without_a_seal_the_tables_still_save_requests_for_what_did_not_change(store, machine, monkeypatch):
    monkeypatch.setattr(manifest_copy, "_WORTH_A_TABLE", 2)
    build(machine("here"), 20)
    url = parse_url(machine("here").url)
    store.client.delete_object(Bucket=BUCKET, Key=url.key(SEAL))
    replaced = report("images", 4, "by hand").model_dump_json().encode()
    store.client.put_object(Bucket=BUCKET, Key=url.key("manifest/images/00004.json"), Body=replaced)
    store.client.delete_object(Bucket=BUCKET, Key=url.key("manifest/images/00005.json"))
    there = machine("there")
    with counted() as seen:
        mirror_of(there).sync()
    assert seen["GetObject"] < 10, "seal, two tables and one entry"
    shards = {entry.shard: entry.fingerprint for entry in entries(there, "images")}
    assert shards == {shard: "by hand" if shard == 4 else "one" for shard in range(20) if shard != 5}


def test_entries_that_are_missing_here_come_back_from_the_tables(machine):
    here = machine("here")
    build(here, 5)
    here.manifest_entry("images", 2).unlink()
    here.manifest_entry("images", 3).write_text("cut sh")
    (here.root / ".s3-seal").unlink()  # as a sync leaves it that was killed
    with counted() as seen:
        assert build(here, 5) == {}
    assert seen["PutObject"] == 2, "the lock's"
    here.manifest_entry("images", 1).unlink()
    assert build(here, 5) == {}


def test_a_reader_beside_a_command_of_its_machine_does_not_bring_old_entries_back(machine):
    here = machine("here")
    build(here, 2)
    with lock_to_change(here, "sdtrain build"):
        (here.root / ".s3-seal").unlink()
        newer = report("images", 1, "newer").model_dump_json()
        here.manifest_entry("images", 1).write_text(newer)
        open_dataset_of(here)
        assert here.manifest_entry("images", 1).read_text() == newer


def open_dataset_of(dataset: DatasetDir) -> None:
    """As another process of this machine opens it."""
    Mirror(dataset, parse_url(dataset.url)).sync(may_delete=False)


def test_a_shard_costs_the_same_requests_however_many_there_are(machine):
    asked = {}
    for num in (4, 8, 12):
        here = replace(machine(f"work {num}"), url=f"{machine('here').url}-{num}")
        with counted() as seen:
            build(here, num)
        asked[num] = seen.total()
    assert asked[12] - asked[8] == asked[8] - asked[4] <= 10 * 4 * len(FOLDERS)
