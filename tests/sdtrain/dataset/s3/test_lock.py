"""One command at a time changes a dataset on S3, from whichever machine; a killed one lets go by the store's clock."""

import time

import pytest

from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3 import lock as module
from sdtrain.dataset.s3.lock import LOCK_NAME, RemoteLock, holder
from sdtrain.dataset.s3.store import ObjectStore
from sdtrain.dataset.s3.url import parse_url
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


def objects(name: str) -> ObjectStore:
    return ObjectStore(parse_url(f"s3://{BUCKET}/{name}"))


def test_a_second_machine_is_told_who_is_at_work_and_gets_the_dataset_afterwards(store, tmp_path):
    here, there = (dataset_at(f"s3://{BUCKET}/two", tmp_path / name) for name in ("here", "there"))
    with lock_to_change(here, "sdtrain build"):
        with pytest.raises(UserError, match=r"in use: sdtrain build is at work \(process \d+ on .*run sdtrain remove"):
            lock_to_change(there, "sdtrain remove")
        assert "sdtrain build is at work" in holder(objects("two"))
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
