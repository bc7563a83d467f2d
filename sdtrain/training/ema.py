"""The exponential moving average of the weights that sampling uses, and averages for any length after training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sdtrain.config.sections import EmaConfig
from sdtrain.formats.post_hoc import decay_of, gamma_of


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
    `post_hoc` has the power-function averages by length, over this run's `num_own_updates` (sdtrain.formats.post_hoc).
    """

    def __init__(self, master: torch.Tensor, config: EmaConfig):
        self._master, self._config = master, config
        self.average = master.detach().clone()
        self.num_updates = 0
        self.post_hoc = {length: master.detach().clone() for length in config.post_hoc}
        self._gammas = {length: gamma_of(length) for length in config.post_hoc}
        self.num_own_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights, after an optimizer step that was applied."""
        for average, weight in self.averages():
            average.lerp_(self._master.detach(), weight)
        self.count_update()

    def averages(self) -> list[tuple[torch.Tensor, float]]:
        """Each average, and how much of the new weights goes into it next: for who updates them, chunk by chunk."""
        number = self.num_own_updates + 1
        own = [(self.post_hoc[length], 1.0 - decay_of(number, gamma)) for length, gamma in self._gammas.items()]
        return [(self.average, 1.0 - ema_decay(self.num_updates, self._config)), *own]

    def count_update(self) -> None:
        """Records that each average was updated."""
        self.num_updates += 1
        self.num_own_updates += 1

    def go_on_from(self, average: torch.Tensor, num_updates: int | None) -> None:
        """Continues an average; without a count its warm-up is over."""
        self.average.copy_(average)
        self.num_updates = _warm_up_updates(self._config) if num_updates is None else num_updates

    def go_on_post_hoc(self, averages: Mapping[float, torch.Tensor], num_own_updates: int) -> None:
        """Continues the power-function averages of this run."""
        for length, average in averages.items():
            self.post_hoc[length].copy_(average)
        self.num_own_updates = num_own_updates


def _warm_up_updates(config: EmaConfig) -> int:
    """Updates after which the decay is the largest: the first n with (1 + n) / (10 + n) >= decay."""
    exactly = (10 * config.decay - 1) / (1 - config.decay)
    return max(0, math.ceil(round(exactly, 6)))  # 0.9 is 80, not a little more
