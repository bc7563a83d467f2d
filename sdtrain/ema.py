"""The exponential moving average of the weights that sampling uses."""

from __future__ import annotations

import torch

from sdtrain.config import EmaConfig


def ema_decay(num_updates: int, config: EmaConfig) -> float:
    """Decay of update `num_updates` (from 0): min(decay, (1 + n) / (10 + n)).

    `LitEma` in CompVis/stable-diffusion, ldm/modules/ema.py; here n counts optimizer steps, there micro-batches.
    """
    if not config.warmup:
        return config.decay
    return min(config.decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """Averages one rank's fp32 partition of the weights: 1/N of the memory, no communication.

    Attributes:
        average: the flat average, fp32, on the partition's device.
    """

    def __init__(self, master: torch.Tensor, config: EmaConfig):
        self._master, self._config = master, config
        self.average = master.detach().clone()

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Moves the average towards the weights, after optimizer step `num_updates` (from 0)."""
        self.average.lerp_(self._master.detach(), 1.0 - ema_decay(num_updates, self._config))
