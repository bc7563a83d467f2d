"""One command at a time changes a dataset on S3, and who works for it stops when the command loses it."""

import json
import threading
import time

import pytest

from sdtrain.dataset.files import publish
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import describe_outputs, read_entry
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3 import lock as module
from sdtrain.dataset.s3.lock import LOCK_NAME, RemoteLock, check_lock_token, holder, with_lock_token
from sdtrain.dataset.s3.mirror import Mirror, mirror_of
from sdtrain.dataset.s3.store import ObjectStore
from sdtrain.dataset.s3.url import parse_url
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import lock_token_of, plain_stage, run_batch
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


def objects(name: str) -> ObjectStore:
    return ObjectStore(parse_url(f"s3://{BUCKET}/{name}"))


def test_a_second_machine_is_told_who_is_at_work_and_gets_the_dataset_afterwards(store, tmp_path):
    here, there = (dataset_at(f"s3://{BUCKET}/two", tmp_path / name) for name in ("here", "there"))
    with lock_to_change(here, "sdtrain build"):
        with pytest.raises(UserError, match=r"in use: sdtrain build is running \(process \d+ on .*run sdtrain remove"):
            lock_to_change(there, "sdtrain remove")
        assert "sdtrain build is running" in holder(objects("two"))
    assert holder(objects("two")) is None
    lock_to_change(there, "sdtrain remove").close()


def test_a_lock_without_a_pulse_expires_and_its_late_holder_may_not_write(store, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY_S", 1.0)
    late = RemoteLock(objects("late"), "sdtrain build")
    late._ended.set()  # suspended: its pulse stops
    late._pulse.join()
    time.sleep(2.5)
    with_next = RemoteLock(objects("late"), "sdtrain decide")
    late._ended.clear()
    late._beat()
    with pytest.raises(UserError, match="another command has taken this dataset over"):
        late.check()
    late.close()
    with_next.check()
    assert "sdtrain decide" in holder(objects("late"))
    with_next.close()


def test_a_holder_that_slept_looks_before_it_writes_and_leaves_the_next_ones_lock(store, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY_S", 1.0)
    late = RemoteLock(objects("slept"), "sdtrain build")
    late._ended.set()  # asleep, main thread and pulse alike
    late._pulse.join()
    time.sleep(2.5)
    with_next = RemoteLock(objects("slept"), "sdtrain decide")
    with pytest.raises(UserError, match="another command has taken this dataset over"):
        late.check()  # before its pulse has beaten again
    late._ended.clear()
    late.close()
    assert "sdtrain decide" in holder(objects("slept"))
    with_next.close()


def test_a_pulse_outlives_a_store_that_fails_for_a_moment(store, monkeypatch):
    held = RemoteLock(objects("shaky"), "sdtrain build")

    def refuse(**_):
        raise module.ConflictError

    def fail(_):
        raise UserError("nobody answers")

    with monkeypatch.context() as shaky:
        shaky.setattr(module, "EXPIRY_S", 0.2)
        shaky.setattr(held, "_write", refuse)
        shaky.setattr(held._store, "read", fail)
        held._ended.set()
        held._pulse.join()
        held._ended.clear()
        held._pulse = module.Thread(target=held._beat, daemon=True)
        held._pulse.start()
        time.sleep(0.5)
        assert held._pulse.is_alive()
    held.check()
    held.close()


def test_a_pulse_keeps_the_lock_beyond_its_expiry(store, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY_S", 2.0)
    held = RemoteLock(objects("pulse"), "sdtrain build")
    time.sleep(3.5)
    held.check()
    with pytest.raises(UserError, match="in use"):
        RemoteLock(objects("pulse"), "sdtrain build")
    held.close()


def test_a_store_without_conditional_writes_is_refused(store, monkeypatch):
    without = objects("plain")
    put = without.put_bytes
    monkeypatch.setattr(without, "put_bytes", lambda content, name, **condition: put(content, name))
    with pytest.raises(UserError, match="does not know conditional writes"):
        RemoteLock(without, "sdtrain build")
    assert objects("plain").read(LOCK_NAME) is None


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
    with pytest.raises(UserError, match="run the command again when no other command uses it"):
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
