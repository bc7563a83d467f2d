"""Section of a training configuration: the samples, their order and how they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sdtrain.config.resuming import Added, DecidesSamples, Free
from sdtrain.settings import Settings


def _checked_choice(choice: dict[str, Any]) -> dict[str, Any]:
    is_order = isinstance(choice.get("first"), tuple)
    lists = [source for source, value in choice.items() if isinstance(value, tuple)]
    if not choice or (is_order and (len(choice) > 1 or not choice["first"])) or (lists and not is_order):
        raise ValueError("write shares of sources, as {alt: 0.3, short: 0.7}, or an order, as {first: [short, alt]}")
    if any(not 0 < share < math.inf for share in choice.values() if isinstance(share, float)):
        raise ValueError("a share is more than 0; leave out a source that is not wanted")
    return choice


CaptionChoice = Annotated[dict[str, float | tuple[str, ...]], AfterValidator(_checked_choice)]
"""Source -> share, or "first" -> sources in order."""


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
    captions: Added[DecidesSamples[CaptionChoice | None]] = None
    """The sources of which a step takes a sample's caption: shares, `{alt: 0.3, short: 0.6, long: 0.1}`, divided again
    among those that the sample has; or `{first: [short, alt]}`, the first that it has. Of several captions of one
    source each is as likely. A sample with none of them keeps its own alt text, as all do by default."""
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
        if self.captions and self.text_embeddings == "cached":
            raise ValueError(
                "captions chooses another text in every step, and only alt texts have cached embeddings: set "
                "text_embeddings to online, or leave captions out"
            )
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The datasets: `sources`, or `root` alone."""
        return self.sources or (SourceConfig(root=self.root),)

    @property
    def name(self) -> str:
        """The datasets' names in messages."""
        return ", ".join(str(Path(source.root)) for source in self.all_sources)
