"""Who works for the command that holds a dataset on S3 stops when that command does not hold it any more."""

import json
import threading

import pytest

from sdtrain.dataset.files import publish
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import describe_outputs, read_entry
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3.lock import LOCK_NAME, check_lock_token, with_lock_token
from sdtrain.dataset.s3.mirror import Mirror, mirror_of
from sdtrain.dataset.s3.store import ObjectStore
from sdtrain.dataset.s3.url import parse_url
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import lock_token_of, plain_stage, run_batch
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


@pytest.fixture
def dataset(store, tmp_path):
    return dataset_at(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "work")


def objects_of(dataset):
    return ObjectStore(parse_url(dataset.url))


def take_over(dataset):
    """As another machine does once the lock has expired."""
    objects_of(dataset).put_bytes(json.dumps({"token": "another"}).encode(), LOCK_NAME)


def rows(dataset, recipe, shards):
    """A stage's work."""
    for shard in shards:
        with publish(dataset.selection(shard)) as temporary:
            temporary.write_text("rows")
        outputs = describe_outputs(dataset, [dataset.selection(shard)])
        yield ShardReport(stage="rows", shard=shard, num_in=1, num_out=1, outputs=outputs)


ROWS = plain_stage("rows", lambda *_: [0, 1, 2], lambda *_: "one", rows)


@pytest.fixture
def worker(dataset, monkeypatch):
    """A dataset as a process sees it that has not taken the lock itself, with a mirror of its own; and the token."""
    with lock_to_change(dataset, "sdtrain build"):
        token, own = lock_token_of(dataset), Mirror(dataset, parse_url(dataset.url))
        monkeypatch.setattr("sdtrain.dataset.storage.mirror_of", lambda _: own)
        yield dataset, token


def test_a_worker_writes_for_the_holder(worker):
    dataset, token = worker
    reports = run_batch(ROWS, dataset, None, [0, 1], lock_token=token)
    assert [report.shard for report in reports] == [0, 1]
    assert objects_of(dataset).read("manifest/rows/00001.json")
    with pytest.raises(UserError, match="has ended, or another one"):
        run_batch(ROWS, dataset, None, [2], lock_token="of a command before")


def test_a_worker_writes_nothing_for_a_holder_that_lost_the_dataset(worker):
    dataset, token = worker
    taken = threading.Event()

    def lose(dataset, recipe, shards):
        for report in rows(dataset, recipe, shards):
            yield report
            if not taken.is_set():
                while read_entry(dataset, "rows", 0) is None:
                    pass
                take_over(dataset)
                taken.set()

    with pytest.raises(UserError, match="another one has taken the dataset over"):
        run_batch(plain_stage("rows", ROWS.shards, ROWS.fingerprint, lose), dataset, None, [0, 1, 2], lock_token=token)
    assert objects_of(dataset).read("manifest/rows/00000.json")
    assert objects_of(dataset).read("manifest/rows/00001.json") is None


def test_a_batch_does_not_take_the_next_holder_of_the_same_folder_for_its_own(dataset):
    with lock_to_change(dataset, "sdtrain build"):
        before = lock_token_of(dataset)
        with with_lock_token(before):
            check_lock_token(objects_of(dataset))
    with lock_to_change(dataset, "sdtrain build"):
        with with_lock_token(before), pytest.raises(UserError, match="has ended, or another one"):
            check_lock_token(objects_of(dataset))
        with with_lock_token(lock_token_of(dataset)):
            check_lock_token(objects_of(dataset))


def test_without_a_holder_nothing_is_written(dataset):
    objects = objects_of(dataset)
    with pytest.raises(UserError, match="has ended, or another one"):
        check_lock_token(objects)
    mirror = mirror_of(dataset)
    (dataset.root / "report.html").write_text("a report")
    with pytest.raises(UserError, match="run the command again when nobody is at work"):
        mirror.push_files([dataset.root / "report.html"])


def test_a_shard_is_written_while_the_next_one_is_made(dataset, monkeypatch):
    next_is_made, put, seen = threading.Event(), ObjectStore.put, []

    def slow(self, path, name, sha256=None):
        if name == "selection/00000.parquet":
            seen.append(next_is_made.wait(30))
        put(self, path, name, sha256)

    def run(dataset, recipe, shards):
        for report in rows(dataset, recipe, shards):
            if report.shard == 1:
                next_is_made.set()
            yield report

    monkeypatch.setattr(ObjectStore, "put", slow)
    with lock_to_change(dataset, "sdtrain build"):
        reports = run_batch(plain_stage("rows", ROWS.shards, ROWS.fingerprint, run), dataset, None, [0, 1, 2])
    assert seen == [True]
    assert [report.shard for report in reports] == [0, 1, 2]


def test_an_upload_that_fails_ends_the_batch_and_keeps_the_shards_before(dataset, monkeypatch):
    put = ObjectStore.put

    def fail(self, path, name, sha256=None):
        if name == "selection/00001.parquet":
            raise UserError("The store is full.")
        put(self, path, name, sha256)

    monkeypatch.setattr(ObjectStore, "put", fail)
    told = []
    with lock_to_change(dataset, "sdtrain build"), pytest.raises(UserError, match="The store is full"):
        run_batch(ROWS, dataset, None, [0, 1, 2], told.append)
    assert [report.shard for report in told] == [0]
    assert [read_entry(dataset, "rows", shard) is not None for shard in (0, 1, 2)] == [True, False, True]
    assert objects_of(dataset).read("manifest/rows/00001.json") is None
    assert objects_of(dataset).read("manifest/rows/00002.json"), "it was finished when the error came"
