"""Spreads a machine's GPUs evenly over its processes, and tells the host memory left to this one."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_claims: list[IO[str]] = []  # open while the process lives: the lock ends with the file


def cores_of_process() -> int:
    """Cores for this process's own threads: its share if each GPU has a process; 2 beside a network on the CPU."""
    import torch

    num_gpus = torch.cuda.device_count()
    return max(2, len(os.sched_getaffinity(0)) // num_gpus) if num_gpus else 2


def available_memory_bytes() -> int:
    """Host memory that this process may still take: the machine's, or what its control group (a container) leaves."""
    free = psutil.virtual_memory().available
    left = [limit - used for limit, used in (_limit(folder) for folder in _control_groups()) if limit is not None]
    return max(0, min([free, *left]))


def _control_groups() -> list[Path]:
    """This process's group and those around it; of version 2, else version 1's for memory."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    names = {kind: name for _, kind, name in (line.split(":", 2) for line in lines)}
    root, name = (_CGROUPS / "memory", names["memory"]) if "memory" in names else (_CGROUPS, names.get("", "/"))
    own = root / name.lstrip("/")
    return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]


def _limit(folder: Path) -> tuple[int | None, int]:
    """A control group's limit and use, without the file cache that it could drop; no limit where there is none."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            bound, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return None if bound == "max" else int(bound), taken - int(stat.get("inactive_file", 0))
    return None, 0


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
