import hashlib
import math
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.config.sections import CheckpointConfig
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import STATE, find_checkpoint, slots_of
from sdtrain.training.checkpoint_writer import CheckpointSaver, CheckpointStore, first_nonfinite, write_tensors

DESCRIPTION = {"config_digest": "c", "data_digest": "d", "parameters": slots_of([("weight", (8,))])}


@pytest.fixture
def gate(monkeypatch):
    """Holds back every write until it is opened."""
    opened = threading.Event()

    def wait_and_write(path, tensors):
        assert opened.wait(30)
        return write_tensors(path, tensors)

    monkeypatch.setattr("sdtrain.training.checkpoint_writer.write_tensors", wait_and_write)
    yield opened
    opened.set()


def saver_of(run_dir, mode="async"):
    return CheckpointSaver(CheckpointStore(run_dir, CheckpointConfig(every=1), 0, 1), mode)


def save_now(saver, step, state):
    saver.start(step, state, **DESCRIPTION)
    saver.wait()


def state_of(value):
    return {name: torch.full((8,), value + i) for i, name in enumerate(STATE)}


def written(run_dir):
    checkpoint = find_checkpoint(run_dir)
    return checkpoint.layout.step, {name: checkpoint.read(name, 0, 8) for name in STATE}


def test_training_goes_on_while_the_state_as_it_was_is_written(tmp_path, gate):
    saver, state = saver_of(tmp_path), state_of(1.0)
    saver.start(1, state, **DESCRIPTION)
    for tensor in state.values():
        tensor.mul_(100)  # the next step
    assert not (tmp_path / "checkpoints" / "step-00000001").exists()
    gate.set()
    assert saver.wait() == tmp_path / "checkpoints" / "step-00000001"
    step, found = written(tmp_path)
    assert step == 1
    assert all(torch.equal(found[name], vector) for name, vector in state_of(1.0).items())


def test_one_is_in_flight_and_the_next_waits_for_it(tmp_path, gate):
    saver = saver_of(tmp_path)
    saver.start(1, state_of(1.0), **DESCRIPTION)
    second = threading.Thread(target=lambda: saver.start(2, state_of(2.0), **DESCRIPTION))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(30)
    saver.wait()
    assert written(tmp_path)[0] == 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_async_and_sync_write_the_same_bytes(tmp_path):
    for mode in ("async", "sync"):
        saver = saver_of(tmp_path / mode, mode)
        saver.start(3, state_of(0.5), **DESCRIPTION)
        saver.start(3, state_of(7.0), **DESCRIPTION)  # this step is there already
        saver.wait()
    files = [sorted((tmp_path / mode / "checkpoints" / "step-00000003").iterdir()) for mode in ("async", "sync")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_full_disk_is_noticed_and_raised_by_the_thread_that_trains(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saver = saver_of(tmp_path)
    saver.start(1, state_of(1.0), **DESCRIPTION)
    saver.wait()
    monkeypatch.setattr("sdtrain.training.checkpoint_writer.write_tensors", full)
    saver.start(2, state_of(2.0), **DESCRIPTION)
    saver._thread.join()
    assert saver.has_failed
    with pytest.raises(UserError, match=r"The checkpoint failed\. The disk is full"):
        saver.wait()
    assert not saver.has_failed
    assert written(tmp_path)[0] == 1


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", STATE)
def test_what_is_not_finite_is_never_written_and_the_checkpoint_before_stays(tmp_path, name, bad, mode):
    saver, state = saver_of(tmp_path, mode), state_of(2.0)
    save_now(saver, 1, state_of(1.0))
    state[name][5] = bad
    meaning = {"master": "The weight", "ema": "The average"}.get(name, "Adam's (first|second) moment")
    with pytest.raises(UserError, match=rf"{meaning} of weight is {bad}, so this state was not written; .* Lower opti"):
        save_now(saver, 2, state)
    assert written(tmp_path)[0] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_the_first_value_that_is_not_finite_is_found_in_any_chunk(monkeypatch):
    monkeypatch.setattr("sdtrain.training.checkpoint_writer._CHUNK", 4)
    assert first_nonfinite(torch.full((10,), 3e38)) is None
    for position in range(10):
        vector = torch.zeros(10)
        vector[position:] = -math.inf
        assert first_nonfinite(vector) == position


def test_files_are_as_the_library_writes_them(tmp_path):
    tensors = {name: torch.randn(5 * 2**20 + i) for i, name in enumerate(STATE)}  # more than one chunk each
    digest = write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = ((tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert digest == hashlib.sha256(ours.read_bytes()).hexdigest()
    assert ours.stat().st_size == theirs.stat().st_size
    loaded = load_file(ours)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="not a flat fp32 or fp16 tensor"):
        write_tensors(tmp_path / "double.safetensors", {"master": torch.zeros(3, dtype=torch.float64)})
    half = {name: tensor[:7].half() for name, tensor in tensors.items()}  # as snapshots are
    write_tensors(tmp_path / "half.safetensors", half)
    assert all(torch.equal(load_file(tmp_path / "half.safetensors")[name], tensor) for name, tensor in half.items())
