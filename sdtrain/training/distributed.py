"""The processes of a training run: rank and device, and the agreements between them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdtrain.errors import UserError
from sdtrain.training.deepspeed_internals import import_deepspeed, require_tested_version

_TIMEOUT = timedelta(minutes=30)
_CUBLAS, _CUBLAS_SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
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
    own_environment: tuple[str, ...] = ()
    """Variables that no launcher had set, but this process: its children would take its port for theirs."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files that all ranks share."""
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

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values."""
        return min(self.gather([value]))

    def gather(self, values: list[ItemT]) -> list[ItemT]:
        """Interleaves the ranks' lists, which hold the results of `work[rank::world_size]`."""
        if self.world_size == 1:
            return values
        parts: list[list[ItemT]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, values, group=self.group)
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            # Through DeepSpeed, or it would go on with groups that are gone if this process joined again.
            import_deepspeed().comm.destroy_process_group()
        for name in self.own_environment:
            os.environ.pop(name, None)


def rank_from_environment() -> int:
    """This process's rank before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def world_size_from_environment() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(local_rank: int | None) -> Ranks:
    """Joins the ranks started by `deepspeed`, `torchrun` or plain Python.

    UserError for more ranks on this machine than GPUs, another DeepSpeed than the tested one, or a port that is taken.
    """
    require_tested_version()
    rank, world_size = rank_from_environment(), world_size_from_environment()
    local = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    own = _fill_environment(rank, world_size, local)
    device = _device(local)
    deepspeed = import_deepspeed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    except dist.DistNetworkError as error:
        raise _unreachable(error) from error
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if backend == "nccl" else None
    checkpoint_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return Ranks(rank, world_size, device, group, checkpoint_group, own)


def _unreachable(error: dist.DistNetworkError) -> UserError:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        return UserError(
            f"Port {port} of this machine is in use, as by another training job that was started with the same one. "
            f"Give each job its own: deepspeed --master_port {_free_port()} sdtrain/train.py ..."
        )
    return UserError(
        f"Rank {os.environ['RANK']} cannot reach the first rank at {address}:{port}. Check --master_addr and "
        f"--master_port, and that no firewall is between the machines. ({str(error).splitlines()[0]})"
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def make_cublas_deterministic() -> None:
    """Gives cuBLAS one workspace of fixed size per stream; call it before CUDA starts.

    See https://docs.nvidia.com/cuda/cublas/#results-reproducibility. UserError if the environment sets another.
    """
    chosen = os.environ.setdefault(_CUBLAS, _CUBLAS_SIZES[0])
    if chosen not in _CUBLAS_SIZES:
        raise UserError(
            f"speed.deterministic needs {_CUBLAS} to be {' or '.join(_CUBLAS_SIZES)}, but it is '{chosen}' in the "
            "environment. Unset it."
        )


def _fill_environment(rank: int, world_size: int, local_rank: int) -> tuple[str, ...]:
    """Sets what a launcher would have set; returns the names of what was not there."""
    defaults = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}
    missing = {name: str(value) for name, value in defaults.items() if name not in os.environ}
    if "MASTER_PORT" not in os.environ:
        missing["MASTER_PORT"] = str(_free_port())
    os.environ.update(missing)
    return tuple(missing)


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
