"""The processes of one training run: who I am, on which device, and what all of us agree on."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdtrain.errors import UserError

_TIMEOUT = timedelta(minutes=30)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Ranks:
    """This process among all. Every method is called by all ranks together."""

    rank: int
    world_size: int
    device: torch.device
    group: Any
    """A gloo group of all ranks: agreements between hosts that do not wait for the GPUs."""
    checkpoint_group: Any
    """Another one, for the threads that write checkpoints while the main threads talk over theirs."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, group=self.group)
        return bool(flags)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of each value over the ranks, on the CPU."""
        total = values.detach().cpu()
        if self.world_size > 1:
            total = total.clone()
            dist.all_reduce(total, group=self.group)
        return total

    def gather(self, values: list[ItemT]) -> list[ItemT]:
        """The lists of all ranks, dealt out one by one in turn: what each rank made of `work[rank::world_size]`."""
        if self.world_size == 1:
            return values
        parts: list[list[ItemT]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, values, group=self.group)
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            # Through DeepSpeed, or it would go on with groups that are gone if this process joined again.
            _import_deepspeed().comm.destroy_process_group()


def rank_from_environment() -> int:
    """This process's rank before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def world_size_from_environment() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(local_rank: int | None) -> Ranks:
    """Joins the other ranks as `deepspeed`, `torchrun` or plain Python started them.

    Args:
        local_rank: the launcher's --local_rank, where the environment does not say it.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    rank, world_size = rank_from_environment(), world_size_from_environment()
    local = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    _fill_environment(rank, world_size, local)
    device = _device(local)
    deepspeed = _import_deepspeed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if backend == "nccl" else None
    checkpoint_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return Ranks(rank, world_size, device, group, checkpoint_group)


def _fill_environment(rank: int, world_size: int, local_rank: int) -> None:
    defaults = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        _share_cores()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"Rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start as many ranks as GPUs (--num_gpus)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _share_cores() -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and told to use the CPU where there is no GPU before it looks for itself."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    # Its shared-memory all-reduce for CPU ranks would be compiled on first use (20 s, needs g++); gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
