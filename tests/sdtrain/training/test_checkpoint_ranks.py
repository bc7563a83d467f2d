"""Two ranks save together, in threads, while their main threads talk to each other."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from sdtrain.config.sections import CheckpointConfig
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import STATE, find_checkpoint, slots_of
from sdtrain.training.checkpoint_writer import CheckpointSaver, CheckpointStore
from tests.sdtrain.launching import free_port

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds
NUM_TALKS = 300


def work(rank, port, run_dir, answers):
    """Saves four times: well; an average of rank 1 is NaN; so again, without a thread; the disk of rank 1 is full."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    store = CheckpointStore(run_dir, CheckpointConfig(every=1), rank, 2, dist.new_group(backend="gloo"))
    said = []
    layout = {"config_digest": "c", "data_digest": "d", "parameters": slots_of([("weight", (100_000,))])}
    for step, mode in ((1, "async"), (2, "async"), (3, "sync"), (4, "async")):
        saver = CheckpointSaver(store, mode)
        if (step, rank) == (4, 1):
            fill_disk()
        state = {name: torch.full((50_000,), float(10 * step + rank)) for name in STATE}
        if step in (2, 3) and rank == 1:
            state["ema"][7] = torch.nan
        try:
            saver.start(step, state, **layout)
            said.append(talk(rank))
            said.append(str(saver.wait().name))
        except UserError as error:
            said.append(str(error))
    answers.put((rank, said))
    dist.destroy_process_group()


def talk(rank):
    """Sums that would come out wrong, or never, if another thread's messages came between."""
    total = torch.zeros(())
    for i in range(NUM_TALKS):
        value = torch.tensor(float(i * (rank + 1)))
        dist.all_reduce(value)
        total += value
    return float(total)


def fill_disk():
    from sdtrain.training import checkpoint_writer

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoint_writer.write_tensors = full


@pytest.fixture
def answers(tmp_path):
    queue, port = FORK.Queue(), free_port()
    processes = [FORK.Process(target=work, args=(rank, port, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    yield [said for _, said in sorted(queue.get(timeout=60) for _ in processes)]
    for process in processes:
        process.join(10)
        process.kill()


def test_a_failure_of_one_is_told_on_all_ranks_and_the_checkpoint_before_stays(tmp_path, answers):
    assert answers[0] == answers[1]
    talks = float(3 * sum(range(NUM_TALKS)))
    first, nonfinite, at_once, full = answers[0][1], answers[0][3], answers[0][4], answers[0][6]
    assert [answers[0][i] for i in (0, 2, 5)] == [talks] * 3
    assert first == "step-00000001"
    assert nonfinite == at_once
    assert nonfinite.startswith("The checkpoint failed. rank 1: The average of weight is nan, so this state was not")
    assert full.startswith("The checkpoint failed. rank 1: The disk is full")
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.layout.step == 1
    assert checkpoint.read("master", 49_999, 50_001).tolist() == [10.0, 11.0]
