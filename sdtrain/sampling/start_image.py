"""The image that image-to-image sampling begins from, and its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.images.crops import resize_and_crop
from sdtrain.images.decode import decode_rgb


@dataclass(frozen=True)
class StartImage:
    """An image file, and how much of it is redrawn; see `open_start_image`.

    Attributes:
        path: the file.
        digest: hex sha256 of its bytes.
        strength: above 0, which leaves it as it is, to 1, which leaves nearly nothing of it.
    """

    path: Path
    digest: str
    strength: float

    def pixels(self, width: int, height: int) -> NDArray[np.uint8]:
        """The image, upright and opaque, resized to cover width and height and cropped at its centre, (H, W, 3)."""
        return resize_and_crop(decode_rgb(self.content()), (width, height), None).pixels

    def content(self) -> bytes:
        """The file's bytes; UserError if they are not those that `digest` is of."""
        content = _read(self.path)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise UserError(f"{self.path} was changed while images were drawn from it. Run the same command again.")
        return content


def open_start_image(path: Path, strength: float = 0.75) -> StartImage:
    """Checks that a file is an image; the default strength is that of CompVis' scripts/img2img.py; else UserError."""
    content = _read(path)
    try:
        decode_rgb(content)
    except OSError as error:
        raise UserError(f"{path} is no image that can be read: {error}") from error
    return StartImage(path, hashlib.sha256(content).hexdigest(), strength)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"There is no image {path} to begin from: {error}") from error


@dataclass(frozen=True)
class EncodedImage:
    """The VAE's posterior of one image: mean and standard deviation, (1, 4, h, w), float32, unscaled."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def sample(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """One sample for each generator, (B, 4, h, w)."""
        noise = [torch.randn(self.mean.shape, generator=generator) for generator in generators]
        return self.mean + self.deviation * torch.cat(noise).to(self.mean.device)


def encode_image(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> EncodedImage:
    """Encodes (H, W, 3) uint8; 0 to 255 become -1 to 1, as in training."""
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(vae.device).float() / 127.5 - 1
    posterior = vae.encode(batch.to(vae.dtype)).latent_dist
    return EncodedImage(posterior.mean.float(), posterior.std.float())
