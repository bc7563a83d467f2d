"""AdamW, with moments in float32 or 8 bits, and its learning rate.

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

MOMENTS = ("exp_avg", "exp_avg_sq")

# In bitsandbytes' words: a moment's name -> its codes, their scale in each block, what each code stands for.
_CODES = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
_BLOCK = 256
_CHUNK = 2**24
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


@torch.no_grad()
def restore_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, moments: Mapping[str, torch.Tensor], step: int
) -> None:
    """Restores moments after `step` applied steps; 8-bit ones without loss, if blocks begin at the same offsets."""
    state, device = optimizer.state[parameter], parameter.device
    if isinstance(optimizer, torch.optim.AdamW):
        state.update({name: moments[name].to(device, copy=True) for name in MOMENTS})
        state["step"] = torch.tensor(float(step), device=device)
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
