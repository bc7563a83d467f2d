"""Settings of the stages that handle pictures: download, pack, encode."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from sdtrain.settings import Settings


class DownloadConfig(Settings):
    """How pictures are fetched and stored; img2dataset's names."""

    image_size: int = Field(default=512, ge=1)
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = "keep_ratio"
    resize_only_if_bigger: bool = True
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(default=95, ge=0, le=100)
    timeout_s: int = Field(default=10, ge=1)
    retries: int = Field(default=2, ge=0)
    threads: int = Field(default=64, ge=1)
    """Connections at once in one child process."""
    shards_per_process: int = Field(default=4, ge=1)
    """Shards that one child process does one after the other."""
    allow_private_hosts: bool = False
    """Fetch from loopback and private networks too: for the demo and for mirrors of your own."""


class PackConfig(Settings):
    """How kept samples are packed."""

    samples_per_shard: int = Field(default=10_000, ge=1)
    seed: int = 42


class EncodeConfig(Settings):
    """How pictures become latents."""

    vae: str = "CompVis/stable-diffusion-v1-4"
    """A diffusers folder (with or without a `vae` subfolder) or a hub id."""
    resolution: int = Field(default=512, ge=8, multiple_of=8)
    batch_size: int = Field(default=8, ge=1)


class PictureRecipe(Protocol):
    """The part of a recipe that the stages in `sdtrain.data` read."""

    @property
    def download(self) -> DownloadConfig:
        """How pictures are fetched."""

    @property
    def pack(self) -> PackConfig:
        """How kept samples are packed."""

    @property
    def encode(self) -> EncodeConfig:
        """How pictures become latents."""
