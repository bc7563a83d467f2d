"""Cost of our optimizer step around forward and backward: the UNet of 50 million parameters, in one run.

    python -m tests.benchmarks.engine [--quick] [--precision bf16|fp32] [--clock wall|processor]

Contenders take turns with whole steps on the same inputs, of 1 and of 3 micro-steps; from the medians of their parts
follow steps of 1 and of 8.

- `engine_overhead`: our complete step (fp32 gradients, norm, guard, AdamW, average, the network's copy) beside the
  bare one: forward, backward with gradients added up in the network's dtype, fused AdamW on one flat fp32 vector.
- `python_calls_per_micro_step`: calls of Python functions in a backward pass, those of `Tensor.backward` among them.
- `bytes_per_parameter`: what the operations after the last backward pass read and write, counted by a dispatch mode,
  whether from memory or from a cache.
- `vs_ddp_fused_adamw`: how many times as fast as DistributedDataParallel on 2 gloo ranks with one thread each: fp32
  weights under bf16 autocast (or fp32), `no_sync` between boundaries, fp32 gradients in bucket views, fused AdamW, no
  average.
- `deepspeed`: the first three of DeepSpeed's own step with the same settings, and of our average after it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from sdtrain.config import TrainConfig
from sdtrain.settings import parse_settings
from tests.benchmarks.engine_traffic import BytesMoved, python_calls
from tests.benchmarks.training_world import MID

ACCUMULATIONS = (8, 1)
_SHORT = 3
"""Micro-steps measured for an accumulation of 8: the first, one in between, the last."""
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


class Network:
    """The UNet of the benchmark on fixed random inputs."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype):
        from sdtrain.models.unet import build_unet

        torch.manual_seed(config.seed)
        self.unet = build_unet(config.unet, config.latent_size)
        torch.nn.Module.to(self.unet, dtype)
        size, width = config.micro_batch_size, config.unet.cross_attention_dim
        self._noisy, self._target = (torch.randn(size, 4, config.latent_size, config.latent_size) for _ in range(2))
        self._inputs = (self._noisy.to(dtype), torch.randint(0, 1000, (size,)), torch.randn(size, 77, width).to(dtype))

    def loss(self, forward: Any) -> torch.Tensor:
        """Mean squared error of `forward`, the network or what wraps it."""
        predicted = forward(*self._inputs).sample.float()
        return torch.nn.functional.mse_loss(predicted, self._target)


class Contender(Protocol):
    """A network with its optimizer."""

    def micro_step(self, is_last: bool) -> None:
        """Forward and backward."""

    def boundary(self) -> None:
        """All that follows the last of them."""


class Ours:
    """The network under ZeRO-1, stepped by us, or by DeepSpeed as `extra` makes it."""

    def __init__(self, config: TrainConfig, accumulation: int, rank: int, extra: Path | None = None):
        from sdtrain.precision import torch_dtype
        from sdtrain.training.ema import Ema
        from sdtrain.training.engine import deepspeed_config, needs_deepspeed_steps, start_engine
        from sdtrain.training.guards import StepGuard
        from sdtrain.training.steps import DeepSpeedSteps, FlatSteps
        from sdtrain.training.zero_partition import ZeroPartition

        self._network = Network(config, torch_dtype(config.precision))
        self._num_parameters = self._network.unet.num_parameters()
        settings = deepspeed_config(config, accumulation, self._num_parameters, extra)
        engine = start_engine(self._network.unet, config, settings)
        partition = ZeroPartition(engine, rank)
        kind = DeepSpeedSteps if needs_deepspeed_steps(config, extra) else FlatSteps
        self._steps = kind(engine, partition, Ema(partition.master, config.ema), StepGuard(config.guard), config)

    def micro_step(self, is_last: bool) -> None:
        """Forward and backward."""
        self._steps.backward(self._network.loss(self._steps))
        if not is_last:
            self._steps.step()

    def boundary(self) -> None:
        """The optimizer step."""
        self._steps.step()

    def counts(self) -> dict[str, float]:
        """Python calls of a later micro-step's backward pass, and bytes that a boundary moves for each parameter."""
        self.micro_step(is_last=False)
        loss = self._network.loss(self._steps)
        calls = python_calls(lambda: self._steps.backward(loss))
        self._steps.step()
        self.micro_step(is_last=True)
        with BytesMoved() as moved:
            self.boundary()
        bytes_each = round(moved.num_bytes / self._num_parameters, 1)
        return {"python_calls_per_micro_step": calls, "bytes_per_parameter": bytes_each}


class Bare:
    """Forward, backward, and AdamW of a flat vector of as many parameters, which have nothing to do with each other."""

    def __init__(self, config: TrainConfig):
        from sdtrain.precision import torch_dtype

        self._network = Network(config, torch_dtype(config.precision))
        flat = torch.nn.Parameter(torch.randn(self._network.unet.num_parameters()))
        flat.grad = 1e-3 * torch.randn_like(flat)
        self._adam = torch.optim.AdamW([flat], lr=config.optimizer.lr, fused=True)

    def micro_step(self, is_last: bool) -> None:
        """Forward and backward."""
        self._network.loss(self._network.unet).backward()

    def boundary(self) -> None:
        """AdamW."""
        self._adam.step()
        self._network.unet.zero_grad()


class Ddp:
    """The network under DistributedDataParallel with fused AdamW."""

    def __init__(self, config: TrainConfig):
        self._network = Network(config, torch.float32)
        self._ddp = torch.nn.parallel.DistributedDataParallel(self._network.unet, gradient_as_bucket_view=True)
        self._adam = torch.optim.AdamW(self._ddp.parameters(), lr=config.optimizer.lr, fused=True)
        self._autocast = config.precision == "bf16"

    def micro_step(self, is_last: bool) -> None:
        """Forward and backward; the last one reduces gradients."""
        with nullcontext() if is_last else self._ddp.no_sync():
            with torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext():
                loss = self._network.loss(self._ddp)
            loss.backward()

    def boundary(self) -> None:
        """AdamW."""
        self._adam.step()
        self._adam.zero_grad()


def measure(config: TrainConfig, rank: int, num: int, clock: Clock) -> dict[str, Any]:
    """Overhead and counts on one rank."""
    seconds: dict[str, dict[int, float]] = {"bare": {}, "ours": {}, "deepspeed": {}}
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        extra = Path(folder) / "deepspeed.json"
        extra.write_text('{"wall_clock_breakdown": false}')  # changes nothing, but is DeepSpeed's to do
        for n in ACCUMULATIONS:
            short = min(n, _SHORT)
            contenders: dict[str, Any] = {
                "bare": Bare(config),
                "ours": Ours(config, short, rank),
                "deepspeed": Ours(config, short, rank, extra),
            }
            for name, taken in _timed(contenders, short, num, clock).items():
                seconds[name][n] = _step(taken, n)
            if short > 1:
                counts = {name: contenders[name].counts() for name in ("ours", "deepspeed")}
    for name, found in counts.items():
        found["engine_overhead"] = {n: round(seconds[name][n] / seconds["bare"][n] - 1, 4) for n in ACCUMULATIONS}
    return counts["ours"] | {"deepspeed": counts["deepspeed"]}


def measure_beside_ddp(config: TrainConfig, rank: int, num: int, clock: Clock) -> dict[str, Any]:
    """Speed beside DDP, on several ranks."""
    ratios = {}
    for n in ACCUMULATIONS:
        short = min(n, _SHORT)
        taken = _timed({"ours": Ours(config, short, rank), "ddp": Ddp(config)}, short, num, clock)
        ratios[n] = round(_step(taken["ddp"], n) / _step(taken["ours"], n), 3)
    return {"vs_ddp_fused_adamw": ratios}


def _timed(contenders: Mapping[str, Contender], short: int, num: int, clock: Clock) -> dict[str, list[float]]:
    """Medians of each contender's micro-steps and boundary."""
    taken: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(num + 1):
        for name, contender in contenders.items():
            marks = [clock()]
            for k in range(short):
                contender.micro_step(is_last=k == short - 1)
                marks.append(clock())
            contender.boundary()
            marks.append(clock())
            taken[name].append([end - begin for begin, end in pairwise(marks)])
    return {name: [statistics.median(part) for part in zip(*runs[1:], strict=True)] for name, runs in taken.items()}


def _step(parts: Sequence[float], num_micro_steps: int) -> float:
    """Seconds of a step, from those of its micro-steps and its boundary."""
    return sum(parts) + (num_micro_steps - min(num_micro_steps, _SHORT)) * parts[1]


def on_ranks(num_ranks: int, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` found on the first of so many fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_on_rank, args=(rank, num_ranks, port, answers, work, *arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found: dict[str, Any] = answers.get()
    for process in processes:
        process.join()
    return found


def _on_rank(
    rank: int, num_ranks: int, port: int, answers: Any, work: Any, settings: Any, num: int, clock: str
) -> None:
    from sdtrain.training.distributed import join

    places = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
    torch.set_num_threads(1)
    ranks = join(None)
    found = work(parse_settings(TrainConfig, settings, "mid"), rank, num, CLOCKS[clock])
    if rank == 0:
        answers.put(found)
    ranks.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 repetitions instead of 25")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a machine that is at work")
    arguments = parser.parse_args()
    settings, num = MID | {"precision": arguments.precision}, 7 if arguments.quick else 25
    found = on_ranks(1, measure, settings, num, arguments.clock)
    found |= on_ranks(2, measure_beside_ddp, settings, num, arguments.clock)
    print(json.dumps(found | {"precision": arguments.precision, "clock": arguments.clock}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
