import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdtrain.config.sections import CheckpointConfig
from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import STATE, Checkpoint, Layout, find_checkpoint, slots_of
from sdtrain.training.checkpoint_writer import CheckpointStore

SLOTS = slots_of([("conv.weight", (2, 3)), ("conv.bias", (3,)), ("scale", ())])
NUMEL = 10


def vectors():
    return {name: torch.arange(NUMEL, dtype=torch.float32) + 100 * i for i, name in enumerate(STATE)}


def save(run_dir, step, offset=0.0, **config):
    store = CheckpointStore(run_dir, CheckpointConfig(**{"every": 1, "keep_last": 2} | config), 0, 1)
    state = {name: vector + offset for name, vector in vectors().items()}
    return store.save(step, state, config_digest="c", data_digest="d", parameters=SLOTS)


def save_from(folder, world_size, state=None, slots=SLOTS):
    """What `world_size` ranks would write, padding included."""
    state = state or vectors()
    numel = len(state["master"])
    size = -(-numel // (2 * world_size)) * 2
    folder.mkdir()
    files = {}
    for rank in range(world_size):
        padded = {n: torch.cat([v, torch.full((size * world_size - numel,), -1.0)]) for n, v in state.items()}
        path = folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
        save_file({n: v[rank * size : (rank + 1) * size].clone() for n, v in padded.items()}, path)
        files[path.name] = sha256_of(path)
    layout = Layout(
        step=1,
        world_size=world_size,
        partition_numel=size,
        config_digest="c",
        data_digest="d",
        files=files,
        parameters=slots,
    )
    (folder / "layout.json").write_text(layout.model_dump_json())
    return Checkpoint(folder)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.integers(1, 6))
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path_factory, writers, readers):
    checkpoint = save_from(tmp_path_factory.mktemp("c") / "step-1", writers)
    checkpoint.verify()
    size = -(-NUMEL // (2 * readers)) * 2
    for name, whole in vectors().items():
        read = torch.cat([checkpoint.read(name, rank * size, (rank + 1) * size) for rank in range(readers)])
        torch.testing.assert_close(read[:NUMEL], whole, rtol=0, atol=0)
        assert (read[NUMEL:] == 0).all()  # padding never comes back


CONVOLUTION = [("first", (3,)), ("conv.weight", (5, 2, 3, 3)), ("last", (2,))]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_any_number_of_ranks_reads_the_other_memory_layout(tmp_path_factory, writers, readers, was_channels_last):
    usual, permuted = slots_of(CONVOLUTION), slots_of(CONVOLUTION, {"conv.weight"})
    stored, wanted = (permuted, usual) if was_channels_last else (usual, permuted)
    named = {slot.name: torch.randn(slot.shape) for slot in usual}
    flat, expected = (torch.cat([slot.flat(named[slot.name]) for slot in slots]) for slots in (stored, wanted))
    checkpoint = save_from(tmp_path_factory.mktemp("c") / "step-1", writers, dict.fromkeys(STATE, flat), stored)
    size = -(-len(flat) // readers)
    read = [checkpoint.read_as(wanted, "ema", rank * size, (rank + 1) * size) for rank in range(readers)]
    assert torch.equal(torch.cat(read)[: len(flat)], expected)
    assert checkpoint.holds(wanted)
    assert not checkpoint.holds(slots_of([*CONVOLUTION, ("more", (1,))]))
    assert all(torch.equal(tensor, named[name]) for name, tensor in checkpoint.weights("ema"))


def test_weights_come_back_by_name(tmp_path):
    weights = dict(Checkpoint(save(tmp_path, 4)).weights("ema"))
    assert {name: tuple(value.shape) for name, value in weights.items()} == {s.name: s.shape for s in SLOTS}
    assert weights["conv.bias"].tolist() == [306, 307, 308]
    assert weights["scale"].item() == 309


def test_newest_stay_and_latest_names_the_newest(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000010"]
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert find_checkpoint(tmp_path).layout.step == 10


def test_permanent_ones_stay(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep_every=4)
    left = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert left == [4, 8, 10, 11]
    with pytest.raises(ValueError, match="keep_every 4 is no multiple of every 3"):
        CheckpointConfig(every=3, keep_every=4)


def test_a_damaged_newer_one_does_not_push_out_whole_ones(tmp_path):
    for step in (10, 11):
        save(tmp_path, step)
    for step in (1, 2, 3):  # training went back to the start, say
        save(tmp_path, step)
    left = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert left == [2, 3, 10, 11]


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "cut_layout"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = next(newest.glob("rank-*"))
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "lost":
        file.unlink()
    else:
        layout = (newest / "layout.json").read_bytes()
        (newest / "layout.json").write_bytes(layout[: len(layout) // 2])
    found = find_checkpoint(tmp_path)
    assert found.layout.step == 1
    assert "step-00000002" in capsys.readouterr().out
    save(tmp_path, 2, offset=0.5)  # training gets there again
    assert dict(find_checkpoint(tmp_path).weights("master"))["scale"].item() == 9.5


def test_a_crash_while_writing_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints" / ".step-00000002.partial"
    torn.mkdir()
    (torn / "rank-00000-of-00002.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path).layout.step == 1
    save(tmp_path, 2)
    assert not torn.exists()


def test_no_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)


def test_a_full_disk_is_a_sentence_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("sdtrain.training.checkpoint_writer.write_tensors", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path).layout.step == 1


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_checkpoints_from_before_there_were_guards_still_load(tmp_path):
    layout = save(tmp_path, 1) / "layout.json"
    content = json.loads(layout.read_text())
    del content["guard"], content["loss_scaler"]
    layout.write_text(json.dumps(content))
    assert find_checkpoint(tmp_path).layout.guard.num_skipped == 0
