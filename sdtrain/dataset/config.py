"""Settings of the stages that handle images: download, pack, encode."""

from __future__ import annotations

import codecs
import re
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from sdtrain.precision import Precision
from sdtrain.settings import Settings

_PROXY = re.compile(r"https?://([^/?#@\s:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?")


class SourceConfig(Settings):
    """A user's own images, imported by `sdtrain import` in place of metadata and the web."""

    path: str
    """A folder of images, tars or Parquet files, or one such file, on this machine."""
    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$")
    """Stands for `path` in the images' URLs, `import://NAME/…`, so that the source may move."""
    columns: dict[Literal["image", "caption"], str] = Field(default={})
    """Names of the columns, or keys of JSON, that hold image and caption; the usual names by default."""
    encoding: str = "utf-8"
    """Of caption files; a byte-order mark overrides it."""
    follow_links: bool = False
    """Read symbolic links that lead out of `path` too, as those of Hugging Face's cache do."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError("not an encoding that Python knows, such as utf-8 or latin-1") from None
        return encoding


class DownloadConfig(Settings):
    """How images are fetched and stored; named as in img2dataset where it has the setting."""

    image_size: int = Field(default=512, ge=1)
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = "keep_ratio"
    resize_only_if_bigger: bool = True
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(default=95, ge=0, le=100)
    reencode: Literal["never", "if_changed", "always"] = "if_changed"
    """Keep the original bytes always (resize_mode must be "no"), if nothing had to change, or never."""
    scaled_decoding: bool = False
    """Let the JPEG decoder halve images, once or more, that are at least twice too large: cheaper than to decode all
    pixels and then scale down, and not quite the same pixels."""
    max_pixels: int = Field(default=2**27, ge=1)
    """Larger images are refused before decoding: a small file can hold an image that fills the memory."""
    verify_hashes: bool = True
    """Drop images whose bytes do not match the metadata's md5 or sha256."""

    contact: str = ""
    """Web or mail address, sent to servers in the User-Agent so that their owners can reach you."""
    timeout_s: float = Field(default=10, gt=0)
    """Longest wait for a connection or for the next bytes."""
    deadline_s: float = Field(default=60, gt=0)
    """Longest time for one URL, including redirects and body."""
    retries: int = Field(default=2, ge=0)
    max_bytes: int = Field(default=64 * 2**20, ge=1)
    max_redirects: int = Field(default=5, ge=0)
    connections: int = Field(default=64, ge=1)
    """Concurrent requests per child process."""
    connections_per_host: int = Field(default=8, ge=1)
    requests_per_host_s: float = Field(default=20, gt=0)
    """Most requests per second that one child process starts at one host."""
    robots_header: bool = True
    """Honour X-Robots-Tag: noai, noimageai, noindex, noimageindex."""
    robots_txt: bool = False
    """Read each host's robots.txt first."""
    tdm_reservation: bool = False
    """Honour TDMRep (tdm-reservation: 1 in a header or in /.well-known/tdmrep.json)."""
    allow_private_hosts: bool = False
    """Fetch from loopback and private networks too, for the demo and for your own mirrors."""
    proxy: str = ""
    """Fetch through an HTTP proxy: http://HOST:PORT, or `environment` for those of HTTPS_PROXY, HTTP_PROXY, ALL_PROXY
    and NO_PROXY. It must refuse private addresses itself, because it resolves names; see docs/downloads.md."""
    ca_file: str = ""
    """PEM file of certificate authorities to trust besides the system's: a private one's, or a TLS-inspecting proxy's.
    """
    unverified_tls: Literal["never", "with_sha256"] = "never"
    """with_sha256: where a server's certificate is not valid, keep the images whose sha256 is the metadata's."""

    shards_per_process: int = Field(default=4, ge=1)
    """Shards that one child process downloads in turn."""

    @model_validator(mode="after")
    def _settings_agree(self) -> DownloadConfig:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(f"for PNG, encode_quality is a compression level from 0 to 9, not {self.encode_quality}")
        if self.reencode == "never" and self.resize_mode != "no":
            raise ValueError(
                'images cannot be resized and keep their bytes: with reencode: never, set resize_mode: "no", or '
                "choose reencode: if_changed"
            )
        if self.scaled_decoding and self.resize_mode == "no":
            raise ValueError('scaled_decoding is for images that are scaled down: with resize_mode: "no", leave it out')
        if self.unverified_tls == "with_sha256" and not self.verify_hashes:
            raise ValueError("unverified_tls: with_sha256 needs verify_hashes: true, which compares the sha256")
        return self

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, proxy: str) -> str:
        if proxy and proxy != "environment" and not _PROXY.fullmatch(proxy):
            # Recipes are recorded, printed and shared. The message does not repeat what may be a password.
            raise ValueError(
                "write http://HOST:PORT or https://HOST:PORT, or `environment`; a user and password belong in the "
                "environment's HTTPS_PROXY, as in http://USER:PASSWORD@HOST:PORT"
            )
        return proxy


_CAPTION_LIMITS = ("min_caption_similarity", "max_caption_tokens")


class CaptionConfig(Settings):
    """Captions of an image besides its own alt text; none by default, and then the stage `caption` is off."""

    from_duplicates: bool = False
    """Collect what duplicates of an image were called: alt texts of the rows that `dedup` groups with it, and of rows
    with its URL that could not be fetched."""
    max_from_duplicates: int = Field(default=16, ge=1)
    """Most such texts of one image, as a placeholder may have a million duplicates."""
    min_caption_similarity: float | None = Field(default=None, ge=-1, le=1)
    """Pack only captions of at least this CLIP similarity; those whose similarity was not measured are not packed."""
    max_caption_tokens: int | None = Field(default=None, ge=3)
    """Pack only captions of at most so many of CLIP's tokens, the start and the end token included: it reads 77."""

    @property
    def is_on(self) -> bool:
        """Whether any caption besides the alt text is asked for."""
        return self.from_duplicates

    def described(self) -> dict[str, Any]:
        """The settings that determine the captions."""
        return self.model_dump(mode="json", exclude=set(_CAPTION_LIMITS), exclude_defaults=True)

    def limits(self) -> dict[str, float]:
        """The limits that are set: which of the captions are packed."""
        return self.model_dump(mode="json", include=set(_CAPTION_LIMITS), exclude_none=True)


class PackConfig(Settings):
    """How kept samples are packed."""

    samples_per_shard: int = Field(default=10_000, ge=1)
    seed: int = 42


class EncodeConfig(Settings):
    """How images become latents."""

    vae: str = "CompVis/stable-diffusion-v1-4"
    """A diffusers folder (with or without a `vae` subfolder) or a hub id."""
    resolution: int = Field(default=512, ge=8, multiple_of=8)
    batch_size: int = Field(default=8, ge=1)
    precision: Precision = "fp32"
    """Precision of the VAE's weights and activations. GPUs multiply 16-bit numbers faster; fp16 rounds eight times
    finer than bf16, and latents that overflow are refused. auto: bf16 if the machine that starts the dataset is
    faster in it, else fp32; the dataset keeps that choice."""
    crop: Literal["centre", "random"] = "centre"
    """Place of the crop along the excess side. The original runs cropped at random in every epoch; a cached crop
    keeps its place, unless num_crops caches several."""
    num_crops: int = Field(default=1, ge=1)
    """1: one crop, placed by `crop`. More: that many crops at random places along the excess side; training uses them
    in turn, one an epoch."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Widths and heights in pixels, multiples of 8; each image gets the one nearest to its shape."""
    bucket_step_px: int = Field(default=0, ge=0, multiple_of=8)
    """Instead of `buckets`: all sizes in multiples of this (64 for SD v1), with about `resolution` squared pixels."""
    bucket_max_aspect: float = Field(default=2.0, ge=1)
    """Largest aspect ratio of the sizes from `bucket_step_px`."""
    text_embeddings: Literal["none", "fp16", "bf16"] = "none"
    """Store each caption's CLIP embedding beside its latent, for `data.text_embeddings: cached` in training: with CLIP
    ViT-L/14 77 x 768 x 2 bytes = 118 kB a sample, seven times a latent at 256 px. bf16: as bf16 training computes it.
    fp16: computed in fp32 and rounded, eight times finer."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """CLIP text encoder with its tokenizer for `text_embeddings`: a folder, a hub id, or `demo`."""
    check_samples: int = Field(default=16, ge=0)
    """Latents of each shard to decode and compare with their images; 0 for none."""
    min_psnr_db: float | None = Field(default=None, ge=0)
    """Their lowest accepted mean PSNR. Null: 17 for a VAE of SD v1's architecture, no bound for others; 0: no bound."""

    @model_validator(mode="after")
    def _buckets_are_sizes(self) -> EncodeConfig:
        if self.buckets and self.bucket_step_px:
            raise ValueError("buckets lists the sizes and bucket_step_px computes them: set one of the two")
        for width, height in self.buckets:
            if min(width, height) < 8 or width % 8 or height % 8:
                raise ValueError(f"the bucket {width} x {height} is not in multiples of 8 pixels")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets names a size twice")
        if self.bucket_step_px > self.resolution:
            raise ValueError(f"bucket_step_px {self.bucket_step_px} is more than resolution {self.resolution}")
        return self


class ImageRecipe(Protocol):
    """The part of a recipe that the stages in `sdtrain.dataset` read."""

    @property
    def source(self) -> SourceConfig | None:
        """Where the images come from; None: from the web."""

    @property
    def download(self) -> DownloadConfig:
        """How images are fetched."""

    @property
    def caption(self) -> CaptionConfig:
        """Which captions the samples carry."""

    @property
    def pack(self) -> PackConfig:
        """How kept samples are packed."""

    @property
    def encode(self) -> EncodeConfig:
        """How images become latents."""
