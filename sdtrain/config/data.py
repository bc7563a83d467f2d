"""Section of a training configuration: the samples, their order and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sdtrain.config.resuming import DecidesSamples, Free
from sdtrain.settings import Settings


class SourceConfig(Settings):
    """One of several datasets."""

    root: Free[str]
    """Dataset directory, holding `latents/`."""
    weight: Free[float] = Field(default=1.0, gt=0)
    """Share of the samples seen, relative to the other weights, whatever the dataset's size."""


class DataConfig(Settings):
    """Where the latents come from."""

    root: Free[str] = "demo-output/data"
    """Dataset directory, holding `latents/`; `--data` on the command line."""
    sources: Free[tuple[SourceConfig, ...]] = ()
    """Several weighted datasets instead of `root`; each has its own epochs, with every sample exactly once."""
    resolution: DecidesSamples[int] = Field(default=512, ge=8, multiple_of=8)
    """Side of the images; latents are 8 times smaller."""
    shuffle: DecidesSamples[Literal["global", "blocks"]] = "global"
    """global: mix all samples (reads all shards at once: for local disks). blocks: mix `window_shards` shards at a
    time, another choice in every epoch (reads each shard sequentially: for network storage)."""
    window_shards: DecidesSamples[int] = Field(default=64, ge=1)
    """Shards mixed by `shuffle: blocks`."""
    bucket_group: DecidesSamples[int] = Field(default=0, ge=0)
    """With aspect-ratio buckets: consecutive samples of one size. A multiple of the micro-batch that divides the global
    batch; 0 for latents of one size."""
    online_vae: DecidesSamples[bool] = False
    """Without latents: read the packed images, crop them at random and encode them in the training loop."""
    text_embeddings: Free[Literal["online", "cached"]] = "online"
    """online: encode captions in the training loop. cached: read the embeddings that `encode.text_embeddings` stored
    beside the latents, which saves 2.5 % of a step's FLOP at 256 px and 0.6 % at 512, and reads 118 kB a sample besides
    the latent's 16 or 66. Dropped captions get the embedding of ""; losses differ by rounding at most."""
    verify: Free[bool] = False
    """Compare each shard with its digest in the manifest before its first read."""
    on_corrupt: Free[Literal["stop", "skip"]] = "stop"
    """At an unreadable sample: stop training, or replace it by another, counted and named."""
    num_prefetch: Free[int] = Field(default=4, ge=1)
    """Micro-batches prepared ahead."""
    num_workers: Free[int] = Field(default=2, ge=1)
    """Threads that prepare micro-batches."""

    @model_validator(mode="after")
    def _options_go_together(self) -> DataConfig:
        if self.online_vae and self.bucket_group:
            raise ValueError("online_vae crops squares and has no aspect-ratio buckets: set bucket_group to 0")
        if self.online_vae and self.verify:
            raise ValueError("verify compares shards of latents, which online_vae does not read: set one of them only")
        if self.online_vae and self.text_embeddings == "cached":
            raise ValueError("text embeddings are cached beside latents, which online_vae does not read: set one only")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The datasets: `sources`, or `root` alone."""
        return self.sources or (SourceConfig(root=self.root),)

    @property
    def name(self) -> str:
        """The datasets' names in messages."""
        return ", ".join(str(Path(source.root)) for source in self.all_sources)
