"""Spreads a machine's GPUs evenly over its processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_claims: list[IO[str]] = []  # open while the process lives: the lock ends with the file


def cores_of_process() -> int:
    """Cores for this process's own threads: its share if each GPU has a process; 2 beside a network on the CPU."""
    import torch

    num_gpus = torch.cuda.device_count()
    return max(2, len(os.sched_getaffinity(0)) // num_gpus) if num_gpus else 2


@lru_cache(maxsize=1)
def claim_device() -> torch.device:
    """This process's GPU, the same at each call; the CPU if there is none.

    Parallel processes need no assignment: each takes the first GPU held by the fewest others on this machine, and
    releases it by ending, however it ends.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    device = torch.device("cuda", claim(gpus, Path(tempfile.gettempdir()) / f"sdtrain-gpus-{os.getuid()}"))
    torch.cuda.set_device(device)
    return device


def claim(gpus: Sequence[str], folder: Path) -> int:
    """Claims the first of the GPUs held by the fewest processes, until this process ends; returns its index in `gpus`.

    Their names must be the same in every process of this machine; `folder` holds the locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for turn in count():
        for position, gpu in enumerate(gpus):
            file = (folder / f"{gpu}.{turn}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _claims.append(file)
            return position
    raise AssertionError("unreachable: turns have no end")
