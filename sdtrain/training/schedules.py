"""Learning rates: pure functions of the optimizer step, so neither the number of ranks nor a resume can shift them."""

from __future__ import annotations

import math

from sdtrain.config.sections import OptimizerConfig, ScheduleConfig

_FIRST_SHARE = 1e-6


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
    """Where between `min_lr` (0) and the full rate (1) the rate is after the warm-up."""
    if schedule.decay_steps is None:
        return 1.0
    done = min(1.0, (step - schedule.warmup_steps) / (schedule.decay_steps - schedule.warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.decay == "cosine" else 1.0 - done
