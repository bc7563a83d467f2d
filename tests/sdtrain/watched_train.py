"""sdtrain/train.py as it is, but it writes down what goes into the network, and can be told to spoil a gradient.

    [WATCH_TO=FOLDER] [SPOIL=STEP:RANK] [SLOW_DISK_S=SECONDS] torchrun ... tests/sdtrain/watched_train.py [arguments]

FOLDER/rank-0.jsonl has a line for every micro-batch (a digest of each sample's latent, noise, timestep and tokens) and
a line for every optimizer step (how many elements each collective operation has reduced since the last one).
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

RANK = int(os.environ.get("RANK", "0"))
SPOILED = os.environ.get("SPOIL", "")
OPERATIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")
reduced = Counter()


def write(**line):
    if "WATCH_TO" in os.environ:
        with (Path(os.environ["WATCH_TO"]) / f"rank-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def watch():
    """Wraps the functions that see everything: the step begun at, the loss of a batch, the optimizer step."""
    from sdtrain.training.state import TrainingState

    begin, losses, step_was_applied = TrainingState.begin, TrainingState.losses, TrainingState.step_was_applied

    def watched_begin(self, step):
        self.next_step = step
        return begin(self, step)

    def watched_losses(self, batch):
        step = self.next_step
        write(step=step, samples=[digest(batch, i) for i in range(len(batch.timesteps))])
        weighted, unweighted = losses(self, batch)
        return (weighted * float("nan") if f"{step}:{RANK}" == SPOILED else weighted), unweighted

    def watched_step(self, step):
        applied = step_was_applied(self, step)
        self.next_step = step + 1
        write(step=step, applied=applied, reduced=dict(reduced))
        reduced.clear()
        return applied

    TrainingState.begin, TrainingState.losses = watched_begin, watched_losses
    TrainingState.step_was_applied = watched_step


def digest(batch, i):
    parts = [batch.moments, batch.posterior, batch.noise, batch.timesteps, batch.token_ids]
    return hashlib.sha256(b"".join(part[i].cpu().numpy().tobytes() for part in parts)).hexdigest()[:16]


def slow_down_disk(seconds):
    """Every checkpoint file is half there for so long."""
    from sdtrain.training import checkpoint_writer

    write_tensors = checkpoint_writer.write_tensors

    def slowly(path, tensors):
        path.write_bytes(b"half of it")
        time.sleep(seconds)
        return write_tensors(path, tensors)

    checkpoint_writer.write_tensors = slowly


def count_collectives():
    for name in OPERATIONS:
        setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))


def counted(name, operation):
    def count(*args, **kwargs):
        tensor = args[0] if args else kwargs.get("tensor", kwargs.get("output"))
        if torch.is_tensor(tensor) and tensor.numel() > 100:  # gradients, not flags and norms
            reduced[name] += tensor.numel()
        return operation(*args, **kwargs)

    return count


if __name__ == "__main__":
    from sdtrain import train
    from sdtrain.training import distributed

    join = distributed.join

    def join_and_watch(local_rank):
        joined = join(local_rank)
        count_collectives()
        watch()
        slow_down_disk(float(os.environ.get("SLOW_DISK_S", "0")))
        return joined

    distributed.join = join_and_watch
    sys.exit(train.main())
