"""Batches for training, prepared in the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPTokenizer

from sdtrain.config import TrainConfig
from sdtrain.data.background import in_background
from sdtrain.data.latent_store import LatentStore
from sdtrain.data.sample_plan import SamplePlan, sample_noise
from sdtrain.diffusion import drop_captions


@dataclass(frozen=True)
class MicroBatch:
    """What one rank needs for one forward pass."""

    moments: torch.Tensor
    """(B, 8, h, w) float16, unscaled."""
    posterior: torch.Tensor
    """(B, 4, h, w) float32 standard normal for the VAE's posterior."""
    noise: torch.Tensor
    """(B, 4, h, w) float32 standard normal, the target."""
    timesteps: torch.Tensor
    """(B,) int64."""
    token_ids: torch.Tensor
    """(B, L) int64; dropped captions are the tokens of ""."""

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on `device`, without waiting for the copy."""
        return MicroBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class BatchMaker:
    """Makes the micro-batches of one rank, each a pure function of (seed, step)."""

    def __init__(self, store: LatentStore, tokenizer: CLIPTokenizer, config: TrainConfig, rank: int, world_size: int):
        self._store, self._tokenizer, self._config = store, tokenizer, config
        self._rank, self._world_size = rank, world_size
        self._plan = SamplePlan(len(store), config.global_batch_size, config.seed)
        self.accumulation = config.accumulation(world_size)

    def __len__(self) -> int:
        return len(self._store)

    def make(self, step: int, micro_step: int) -> MicroBatch:
        """The rank's share of micro-step `micro_step` of optimizer step `step`."""
        config = self._config
        indices = self._plan.micro_batch(step, micro_step, self._rank, self._world_size, config.micro_batch_size)
        shape = (4, *self._store.shape[1:])
        chances = [
            sample_noise(config.seed, step, uid, config.diffusion.num_timesteps, shape)
            for uid in self._store.uids(indices)
        ]
        captions = drop_captions(
            self._store.captions(indices), [chance.drop for chance in chances], config.caption_dropout
        )
        return MicroBatch(
            moments=self._store.get(indices),
            posterior=torch.from_numpy(np.stack([chance.posterior for chance in chances])),
            noise=torch.from_numpy(np.stack([chance.noise for chance in chances])),
            timesteps=torch.tensor([chance.timestep for chance in chances]),
            token_ids=tokenize(self._tokenizer, captions),
        )

    def prefetch(self, first_step: int, last_step: int, pin_memory: bool) -> Iterator[MicroBatch]:
        """All micro-batches of steps [first_step, last_step), prepared by a background thread."""
        wanted = ((step, k) for step in range(first_step, last_step) for k in range(self.accumulation))
        yield from in_background(
            (self._pinned(self.make(*w), pin_memory) for w in wanted), self._config.data.num_prefetch
        )

    @staticmethod
    def _pinned(batch: MicroBatch, pin_memory: bool) -> MicroBatch:
        return MicroBatch(**{n: v.pin_memory() for n, v in vars(batch).items()}) if pin_memory else batch


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids, (B, L) int64: cut and padded to the encoder's length, the end token kept."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids
