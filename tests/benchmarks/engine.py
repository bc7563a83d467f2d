"""Cost of our optimizer step around forward and backward: the UNet of 50 million parameters, in one run.

    python -m tests.benchmarks.engine [--quick] [--precision bf16|fp32] [--clock wall|processor]

Each repetition times, one after the other on the same inputs, a micro-step (forward, backward) and the boundary of an
optimizer step, of the contenders in turn; figures are of the medians, for 8 and for 1 micro-steps a step.

- `engine_overhead`: our complete step (fp32 gradients, norm, guard, AdamW, average, the network's copy) beside the bare
  one: forward, backward with gradients in the network's dtype, and torch's fused AdamW on one flat fp32 vector.
- `python_calls_per_micro_step`: calls of Python functions in a backward pass, those of `Tensor.backward` among them.
- `bytes_per_parameter`: what the operations of the boundary read and write, counted by a dispatch mode, cache or not.
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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from sdtrain.config import TrainConfig
from sdtrain.settings import parse_settings
from tests.benchmarks.engine_traffic import BytesMoved, python_calls
from tests.benchmarks.training_world import MID

ACCUMULATIONS = (8, 1)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
Times = dict[str, list[float]]


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


class Ours:
    """The network under ZeRO-1 with accumulation 1, stepped by us, or by DeepSpeed as `extra` makes it."""

    def __init__(self, config: TrainConfig, rank: int, extra: Path | None = None):
        from sdtrain.precision import torch_dtype
        from sdtrain.training.ema import Ema
        from sdtrain.training.engine import deepspeed_config, needs_deepspeed_steps, start_engine
        from sdtrain.training.guards import StepGuard
        from sdtrain.training.steps import DeepSpeedSteps, FlatSteps
        from sdtrain.training.zero_partition import ZeroPartition

        self._network = Network(config, torch_dtype(config.precision))
        self.num_parameters = self._network.unet.num_parameters()
        engine = start_engine(self._network.unet, config, deepspeed_config(config, 1, self.num_parameters, extra))
        partition = ZeroPartition(engine, rank)
        kind = DeepSpeedSteps if needs_deepspeed_steps(config, extra) else FlatSteps
        self._steps = kind(engine, partition, Ema(partition.master, config.ema), StepGuard(config.guard), config)

    def micro_step(self) -> None:
        self._steps.backward(self._network.loss(self._steps))

    def boundary(self) -> None:
        self._steps.step()

    def counts(self) -> dict[str, float]:
        """Python calls of a backward pass, and bytes that a boundary moves for each parameter."""
        loss = self._network.loss(self._steps)
        calls = python_calls(lambda: self._steps.backward(loss))
        with BytesMoved() as moved:
            self.boundary()
        bytes_each = round(moved.num_bytes / self.num_parameters, 1)
        return {"python_calls_per_micro_step": calls, "bytes_per_parameter": bytes_each}


class Bare:
    """Forward, backward, and AdamW of a flat vector of as many parameters, which have nothing to do with each other."""

    def __init__(self, config: TrainConfig):
        from sdtrain.precision import torch_dtype

        self._network = Network(config, torch_dtype(config.precision))
        flat = torch.nn.Parameter(torch.randn(self._network.unet.num_parameters()))
        flat.grad = 1e-3 * torch.randn_like(flat)
        self._adam = torch.optim.AdamW([flat], lr=config.optimizer.lr, fused=True)

    def micro_step(self) -> None:
        self._network.loss(self._network.unet).backward()

    def boundary(self) -> None:
        self._adam.step()

    def clear(self) -> None:
        self._network.unet.zero_grad()


class Ddp:
    """The network under DistributedDataParallel with fused AdamW."""

    def __init__(self, config: TrainConfig):
        self._network = Network(config, torch.float32)
        self._ddp = torch.nn.parallel.DistributedDataParallel(self._network.unet, gradient_as_bucket_view=True)
        self._adam = torch.optim.AdamW(self._ddp.parameters(), lr=config.optimizer.lr, fused=True)
        self._autocast = config.precision == "bf16"

    def micro_step(self) -> None:
        with self._ddp.no_sync():
            self._backward()

    def boundary(self) -> None:
        """The last micro-step too, for it is what sends gradients."""
        self._backward()
        self._adam.step()
        self._adam.zero_grad()

    def _backward(self) -> None:
        with torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext():
            loss = self._network.loss(self._ddp)
        loss.backward()


def measure(config: TrainConfig, rank: int, num: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Overhead and counts on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        extra = Path(folder) / "deepspeed.json"
        extra.write_text('{"wall_clock_breakdown": false}')  # changes nothing, but is DeepSpeed's to do
        contenders = {"bare": Bare(config), "ours": Ours(config, rank), "deepspeed": Ours(config, rank, extra)}
        times = _timed(contenders, num, clock)
    bare, ours, theirs = ({n: _step(times[name], n) for n in ACCUMULATIONS} for name in contenders)
    overhead, others = ({str(n): round(steps[n] / bare[n] - 1, 4) for n in ACCUMULATIONS} for steps in (ours, theirs))
    counts = {name: contenders[name].counts() for name in ("ours", "deepspeed")}
    return {
        "engine_overhead": overhead,
        **counts["ours"],
        "deepspeed": {"engine_overhead": others, **counts["deepspeed"]},
    }


def measure_beside_ddp(config: TrainConfig, rank: int, num: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Speed beside DDP, on several ranks."""
    times = _timed({"ours": Ours(config, rank), "ddp": Ddp(config)}, num, clock)
    ratios = {n: _step(times["ddp"], n - 1) / _step(times["ours"], n) for n in ACCUMULATIONS}
    return {"vs_ddp_fused_adamw": {str(n): round(ratio, 3) for n, ratio in ratios.items()}}


def _timed(contenders: dict[str, Any], num: int, clock: Callable[[], float]) -> dict[str, Times]:
    times: dict[str, Times] = {name: {"micro_step": [], "boundary": []} for name in contenders}
    for repetition in range(num + 1):
        for name, contender in contenders.items():
            for part, seconds in times[name].items():
                began = clock()
                getattr(contender, part)()
                if repetition:  # the first warms up
                    seconds.append(clock() - began)
            if isinstance(contender, Bare):
                contender.clear()
    return times


def _step(times: Times, num_micro_steps: int) -> float:
    return num_micro_steps * statistics.median(times["micro_step"]) + statistics.median(times["boundary"])


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
