"""The exponential moving average of the weights that sampling uses."""

from __future__ import annotations

import math

import torch

from sdtrain.config.sections import EmaConfig


def ema_decay(num_updates: int, config: EmaConfig) -> float:
    """Decay of update `num_updates` (from 0): min(decay, (1 + n) / (10 + n)).

    `LitEma` in CompVis/stable-diffusion, ldm/modules/ema.py; here n counts optimizer steps, there micro-batches.
    """
    if not config.warmup:
        return config.decay
    return min(config.decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """Averages one rank's fp32 partition of the weights: 1/N of the memory, no communication.

    `average` is flat fp32 on the partition's device; `num_updates` includes those of the runs it started from.
    """

    def __init__(self, master: torch.Tensor, config: EmaConfig):
        self._master, self._config = master, config
        self.average = master.detach().clone()
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights, after an optimizer step that was applied."""
        self.average.lerp_(self._master.detach(), 1.0 - ema_decay(self.num_updates, self._config))
        self.num_updates += 1

    def go_on_from(self, average: torch.Tensor, num_updates: int | None) -> None:
        """Continues an average; without a count its warm-up is over."""
        self.average.copy_(average)
        self.num_updates = _warm_up_updates(self._config) if num_updates is None else num_updates


def _warm_up_updates(config: EmaConfig) -> int:
    """Updates after which the decay is the largest: the first n with (1 + n) / (10 + n) >= decay."""
    exactly = (10 * config.decay - 1) / (1 - config.decay)
    return max(0, math.ceil(round(exactly, 6)))  # 0.9 is 80, not a little more
