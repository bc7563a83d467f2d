"""AdamW, with moments in float32 or 8 bits, its learning rate, and the pass that renews weights and average.

The rate is a pure function of the optimizer step, so neither the number of ranks nor a resume can shift it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdtrain.config import TrainConfig
from sdtrain.config.sections import OptimizerConfig, ScheduleConfig
from sdtrain.preflight.training import check_moments
from sdtrain.training.ema import Ema

MOMENTS = ("exp_avg", "exp_avg_sq")

# In bitsandbytes' words: a moment's name -> its codes, their scale in each block, what each code stands for.
_CODES = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
_BLOCK = 256
_CHUNK = 2**24
_CPU_CHUNK = 2**19
_FIRST_SHARE = 1e-6


def make_adamw(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on every parameter, as in the original runs.

    In 8 bits, each moment is a code in blocks of 256 with their largest value beside them (Dettmers et al. 2022,
    arXiv:2110.02861). UserError if 8 bits are configured and bitsandbytes is not installed.
    """
    chosen = config.optimizer
    common: dict[str, Any] = {
        "lr": chosen.lr,
        "betas": chosen.betas,
        "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
    }
    if chosen.moments == "fp32":
        return torch.optim.AdamW(parameters, **common, fused=config.speed.fused_adamw)
    check_moments(config)
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(parameters, **common)
    # Its codes end at 1 and at -0.993: a block whose largest value is negative would shrink when it is put back.
    optimizer.name2qmap["dynamic"][0] = -1.0
    made: torch.optim.Optimizer = optimizer
    return made


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets the rate of the next step, on an optimizer of torch or DeepSpeed."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both moments of a parameter in float32; zeros before the first step."""
    state = optimizer.state[parameter]
    if not state:
        return {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
    if MOMENTS[0] in state:
        return {name: state[name] for name in MOMENTS}
    return {name: _decoded(*(state[part] for part in parts if part in state)) for name, parts in _CODES.items()}


def begin_moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of torch's AdamW for `parameter`: made, as its first step would, where there is none."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS})
    return state


@torch.no_grad()
def restore_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, moments: Mapping[str, torch.Tensor], step: int
) -> None:
    """Restores moments after `step` applied steps; 8-bit ones without loss, if blocks begin at the same offsets."""
    state, device = optimizer.state[parameter], parameter.device
    if isinstance(optimizer, torch.optim.AdamW):
        state.update({name: moments[name].to(device, copy=True) for name in MOMENTS})
        # Only the fused kernel reads it on the device; the others would make the host wait for it in each step.
        state["step"] = torch.tensor(float(step), device=device if optimizer.defaults["fused"] else "cpu")
        return
    group: dict[str, Any] = optimizer.param_groups[0]
    optimizer.init_state(group, parameter, 0, 0)  # type: ignore[attr-defined]
    state["step"] = step
    for name, (codes, scales, meanings) in _CODES.items():
        if meanings not in state:
            state[codes].copy_(moments[name])  # so small that bitsandbytes keeps it in float32
        else:
            _encode(moments[name], state[codes], state[scales], state[meanings])


def _decoded(codes: torch.Tensor, scales: torch.Tensor | None = None, meanings: torch.Tensor | None = None) -> Any:
    """In host memory and chunks, because the device may have no room for moments in 32 bits."""
    if scales is None:
        return codes
    from bitsandbytes.functional import dequantize_blockwise

    found = torch.empty(codes.numel(), dtype=torch.float32)
    for first in range(0, codes.numel(), _CHUNK):
        part = slice(first, first + _CHUNK)
        absmax = scales[first // _BLOCK : (first + _CHUNK) // _BLOCK]
        found[part] = dequantize_blockwise(codes[part], absmax=absmax, code=meanings, blocksize=_BLOCK)
    return found


def _encode(moment: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, meanings: torch.Tensor) -> None:
    """Writes the nearest codes; the library's search sometimes takes a neighbour."""
    between = (meanings[1:] + meanings[:-1]) / 2
    for number, chunk in enumerate(moment.split(_CHUNK)):
        part = chunk.to(codes.device)
        blocks = torch.nn.functional.pad(part, (0, -len(part) % _BLOCK)).reshape(-1, _BLOCK)
        largest = blocks.abs().amax(dim=1)
        shares = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        nearest = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
        first = number * _CHUNK
        codes[first : first + len(part)] = nearest.flatten()[: len(part)]
        scales[first // _BLOCK : first // _BLOCK + len(largest)] = largest


class PartitionUpdate:
    """Applies gradients to one rank's partition.

    On CPUs it goes chunk by chunk, so that the average and the network's copy read weights that AdamW has just left in
    the cache. A GPU's cache is too small for that to outweigh the launches.

    Args:
        adam: the optimizer of `master`.
        master: flat fp32 weights, (N,).
        network: the network's own weights of that partition, (N,).
        ema: what averages them.
    """

    def __init__(self, adam: torch.optim.Optimizer, master: torch.Tensor, network: torch.Tensor, ema: Ema):
        self._adam, self._master, self._network, self._ema = adam, master, network, ema
        self._is_fused = isinstance(adam, torch.optim.AdamW) and bool(adam.defaults["fused"])

    @torch.no_grad()
    def apply(self, gradient: torch.Tensor, factor: torch.Tensor | float | None) -> None:
        """Does a step with `gradient`, (N,), which is multiplied by `factor` where it lies."""
        if not self._is_fused:
            self._step_of_the_optimizer(gradient, factor)
        settings = self._fused_settings() if self._is_fused else None
        averages = self._ema.averages()
        for chunk in self._chunks():
            master = self._master[chunk]
            if settings is not None:
                self._fused_step(chunk, _scaled(gradient[chunk], factor), settings)
            for average, weight in averages:
                average[chunk].lerp_(master, weight)
            self._network[chunk].copy_(master)
        self._ema.count_update()

    def _chunks(self) -> list[slice]:
        size = self._master.numel() if self._master.is_cuda else _CPU_CHUNK
        return [slice(first, first + size) for first in range(0, self._master.numel(), size)]

    def _step_of_the_optimizer(self, gradient: torch.Tensor, factor: torch.Tensor | float | None) -> None:
        self._master.grad = _scaled(gradient, factor)
        self._adam.step()
        self._master.grad = None

    def _fused_settings(self) -> dict[str, Any]:
        """Arguments of the kernel behind `torch.optim.AdamW(fused=True)`, for one more step."""
        group = self._adam.param_groups[0]
        self._moments = begin_moments(self._adam, self._master)
        self._moments["step"] += 1
        beta1, beta2 = group["betas"]
        same = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        return same | {"beta1": beta1, "beta2": beta2, "grad_scale": None, "found_inf": None}

    def _fused_step(self, chunk: slice, gradient: torch.Tensor, settings: dict[str, Any]) -> None:
        first, second = self._moments["exp_avg"][chunk], self._moments["exp_avg_sq"][chunk]
        step = [self._moments["step"]]
        torch._fused_adamw_([self._master[chunk]], [gradient], [first], [second], [], step, **settings)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor | float | None) -> torch.Tensor:
    """The gradient in float32, in its own memory where it is float32 already."""
    whole = gradient.float()
    return whole if factor is None else whole.mul_(factor)


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (from 0).

    It rises linearly from 1e-6 of `optimizer.lr` over the warm-up: `LambdaLinearScheduler` in
    CompVis/stable-diffusion, ldm/lr_scheduler.py, with f_start 1e-6. Then it stays, or falls to `schedule.min_lr` along
    half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5) or a line, and stays there.
    """
    if step < schedule.warmup_steps:
        return optimizer.lr * (_FIRST_SHARE + (1.0 - _FIRST_SHARE) * step / schedule.warmup_steps)
    return schedule.min_lr + (optimizer.lr - schedule.min_lr) * _height(step, schedule)


def _height(step: int, schedule: ScheduleConfig) -> float:
    """The rate after warm-up, from 0 (`min_lr`) to 1 (the full rate)."""
    if schedule.decay_steps is None:
        return 1.0
    done = min(1.0, (step - schedule.warmup_steps) / (schedule.decay_steps - schedule.warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.decay == "cosine" else 1.0 - done
