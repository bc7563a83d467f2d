"""Section of a training configuration: which samples, in which order, read how."""

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
    """Its share of the samples seen, in proportion to the other weights, whatever its size."""


class DataConfig(Settings):
    """Where the latents come from."""

    root: Free[str] = "demo-output/data"
    """Dataset directory, holding `latents/`; `--data` on the command line."""
    sources: Free[tuple[SourceConfig, ...]] = ()
    """Several datasets with weights, in the place of `root`. Each goes through its own epochs, exactly once in each."""
    resolution: DecidesSamples[int] = Field(default=512, ge=8, multiple_of=8)
    """Side of the images in pixels; latents are 8 times smaller."""
    shuffle: DecidesSamples[Literal["global", "blocks"]] = "global"
    """Mix all samples (reads from all shards at once: for local disks), or only those of `window_shards` shards at a
    time, in another choice of shards every epoch (each shard is read in one stretch: for network storage)."""
    window_shards: DecidesSamples[int] = Field(default=64, ge=1)
    """Shards that `shuffle: blocks` mixes."""
    bucket_group: DecidesSamples[int] = Field(default=0, ge=0)
    """For latents with aspect-ratio buckets: how many samples in a row have one size. A multiple of the micro-batch
    that divides the global batch; 0 for latents of one size."""
    online_vae: DecidesSamples[bool] = False
    """Use no latents: read the packed images, crop them at random and encode them in the training loop."""
    verify: Free[bool] = False
    """Compare each shard with its digest in the manifest before it is first read."""
    on_corrupt: Free[Literal["stop", "skip"]] = "stop"
    """What to do about a sample that cannot be read: stop training, or take another in its place, counted and named."""
    num_prefetch: Free[int] = Field(default=4, ge=1)
    """Micro-batches that are prepared ahead."""
    num_workers: Free[int] = Field(default=2, ge=1)
    """Threads that prepare them."""

    @model_validator(mode="after")
    def _options_go_together(self) -> DataConfig:
        if self.online_vae and self.bucket_group:
            raise ValueError("online_vae crops squares and has no aspect-ratio buckets: set bucket_group to 0")
        if self.online_vae and self.verify:
            raise ValueError("verify compares shards of latents, which online_vae does not read: set one of them only")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The datasets: those in `sources`, or `root` alone."""
        return self.sources or (SourceConfig(root=self.root),)

    @property
    def name(self) -> str:
        """The datasets as they are named in sentences."""
        return ", ".join(str(Path(source.root)) for source in self.all_sources)
