"""Real gloo ranks, forked from a server that has imported torch and DeepSpeed, for which each would take seconds.

Not from the tests' own process: whatever its other threads have locked at that moment stays locked in a fork.
"""

import multiprocessing
import os
import traceback

import torch

from tests.sdtrain.launching import free_port

_IMPORTED = [
    "deepspeed",
    "sdtrain.training.deepspeed_internals",
    "sdtrain.training.zero_partition",
    "sdtrain.training.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tests.sdtrain.training.forked_ranks",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


def on_ranks(num_ranks, jobs):
    """What each of `jobs` ({name: (work, arguments)}) returned for `work(ranks, *arguments)` on each rank, by name."""
    queue, port = _CONTEXT.Queue(), free_port()
    processes = [_CONTEXT.Process(target=_work, args=(rank, num_ranks, port, queue, jobs)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    try:
        answers = sorted((queue.get(timeout=120) for _ in processes), key=lambda answer: answer[0])
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    if failed := [answer for _, answer in answers if isinstance(answer, str)]:
        raise AssertionError(failed[0])
    return {name: [answer[name] for _, answer in answers] for name in jobs}


def _work(rank, num_ranks, port, queue, jobs):
    from sdtrain.training.distributed import join

    torch.set_num_threads(1)
    places = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
    try:
        ranks = join(None)
        answer = {name: work(ranks, *arguments) for name, (work, arguments) in jobs.items()}
        ranks.close()
    except BaseException:
        answer = traceback.format_exc()
    queue.put((rank, answer))
