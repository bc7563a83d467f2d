"""Measures the loss on held-out samples at fixed timesteps with fixed noise, comparable between steps.

Training loss is mostly noise from a batch's random timesteps. Here every sample has the same timesteps, the same noise
and its own caption, as in MLPerf's text-to-image benchmark (mlcommons/training, text_to_image/README.md: loss averaged
over 8 equidistant timesteps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.config import TrainConfig
from sdtrain.loading.loader import BatchMaker, MicroBatch
from sdtrain.loading.sample_plan import SampleIndices
from sdtrain.training.distributed import Ranks

# Steps count from 0, so no training step has this noise.
_NOISE_STEP = -1


class Validation:
    """Held-out samples of a run, the last of its `batches`; all ranks share the work.

    `timesteps` are in the middle of equal parts of the noise schedule.
    """

    def __init__(self, config: TrainConfig, batches: BatchMaker, ranks: Ranks):
        self._config, self._maker, self._ranks = config, batches, ranks
        self._indices = np.arange(len(batches) - config.validation.num_samples, len(batches))
        num_parts, length = config.validation.num_timesteps, config.diffusion.num_timesteps
        self.timesteps = [(2 * part + 1) * length // (2 * num_parts) for part in range(num_parts)]

    @torch.no_grad()
    def losses(
        self, losses_of: Callable[[MicroBatch], torch.Tensor], moved: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Mean loss at each timestep, summed in one order, however many ranks share the work.

        Calls `moved` before each batch, because validation may exceed the watchdog's timeout.
        """
        rank, world_size, size = self._ranks.rank, self._ranks.world_size, self._config.micro_batch
        found = torch.zeros(len(self.timesteps), len(self._indices), dtype=torch.float64)
        mine = np.arange(rank, len(self._indices), world_size)
        most = -(-len(self._indices) // world_size)
        for first in range(0, most, size):
            moved()  # as often on every rank, though some have a sample less
            places = mine[first : first + size]
            if not len(places):
                break
            batch = self._batch(places).to(self._ranks.device)
            for row, timestep in enumerate(self.timesteps):
                at = replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
                found[row, places] = losses_of(at).double().cpu()
        return [float(value) for value in self._ranks.sum(found).mean(dim=1)]

    def _batch(self, places: NDArray[np.int64]) -> MicroBatch:
        """The samples with their noise and captions; none is dropped."""
        return self._maker.assemble(SampleIndices(self._indices[places], np.zeros_like(places)), _NOISE_STEP, 0.0)
