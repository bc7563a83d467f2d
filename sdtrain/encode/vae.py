"""Runs the frozen VAE: images to posterior moments, latents to images."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.precision import torch_dtype

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

    from sdtrain.models.copies import PendingCopy

# A process may encode shards in several threads: they decode in parallel and take turns at the VAE.
_ONE_AT_A_TIME = Lock()
_CHECKED_PX = 64


def shared_vae(name: str, device: torch.device | None = None, precision: str = "fp32") -> AutoencoderKL:
    """This process's copy of a VAE, on `device` or by default its own GPU (or the CPU)."""
    from sdtrain.models.device import claim_device

    # Two concurrent loads leave accelerate's patch of nn.Module behind, and later networks would have no weights.
    with _ONE_AT_A_TIME:
        return _loaded_vae(name, str(device or claim_device()), precision)


def posterior_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Moments of (B, 3, H, W) uint8 images on the VAE's device: (B, 8, H/8, W/8), mean and log-variance, unscaled."""
    import torch

    with _ONE_AT_A_TIME, torch.inference_mode():
        inputs = pixels.to(torch.float32) / 127.5 - 1
        moments: torch.Tensor = vae.encode(inputs.to(vae.dtype)).latent_dist.parameters
    return moments.float()


class PendingMoments:
    """Posterior moments that a GPU may still be computing."""

    def __init__(self, copy: PendingCopy):
        self._copy = copy

    def wait(self) -> NDArray[np.float16]:
        """(B, 8, H/8, W/8), mean and log-variance, unscaled; UserError if float16 cannot hold the VAE's numbers."""
        encoded: NDArray[np.float16] = self._copy.wait().numpy().astype(np.float16)
        if not np.isfinite(encoded).all():
            raise UserError("The VAE gives latents that are not finite; its weights are damaged or not for this use.")
        return encoded


def start_encoding(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> PendingMoments:
    """Begins to encode (B, H, W, 3) uint8 images: a GPU while the host goes on, a CPU at once."""
    import torch

    from sdtrain.models.copies import copies_of

    copies = copies_of(vae.device)
    images = copies.to_device(torch.from_numpy(pixels)).permute(0, 3, 1, 2)
    return PendingMoments(copies.to_host(posterior_moments(vae, images)))


def encode_pixels(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Posterior moments of (B, H, W, 3) uint8 images: (B, 8, H/8, W/8), mean and log-variance, unscaled.

    UserError if float16 cannot hold the VAE's numbers.
    """
    return start_encoding(vae, pixels).wait()


def decode_latent(vae: AutoencoderKL, latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decodes an unscaled (4, h, w) latent to an image, (H, W, 3), 0 to 255."""
    import torch

    with _ONE_AT_A_TIME, torch.inference_mode():
        image = vae.decode(torch.from_numpy(latent)[None].to(vae.device, vae.dtype)).sample[0]
    pixels: NDArray[np.float32] = image.float().clamp(-1, 1).permute(1, 2, 0).cpu().numpy()
    return 127.5 * (pixels + 1)


@lru_cache(maxsize=1)
def _loaded_vae(name: str, device: str, precision: str) -> AutoencoderKL:
    import torch

    from sdtrain.formats.frozen import load_vae

    # fp16 convolutions on CUDA want channels last, or each one transposes its input.
    layout = torch.channels_last if device.startswith("cuda") else torch.contiguous_format
    vae = load_vae(name)
    torch.nn.Module.to(vae, device, torch_dtype(precision)).to(memory_format=layout)
    return vae


@lru_cache  # runs of a chain share networks
def check_vae(name: str) -> str:
    """Encodes and decodes a small image.

    UserError if there is no such VAE, or its latents are not four channels of an eighth of the image's side.
    """
    import torch

    from sdtrain.formats.frozen import load_vae, vae_digest, vae_scaling_factor
    from sdtrain.models.unet import LATENT_CHANNELS

    vae, digest, factor = load_vae(name), vae_digest(name), vae_scaling_factor(name)
    with torch.inference_mode():
        moments = vae.encode(torch.zeros(1, 3, _CHECKED_PX, _CHECKED_PX)).latent_dist.parameters
        expected = (1, 2 * LATENT_CHANNELS, _CHECKED_PX // 8, _CHECKED_PX // 8)
        if tuple(moments.shape) != expected:
            raise UserError(
                f"The VAE '{name}' makes {moments.shape[1] // 2} channels of {moments.shape[3]} x {moments.shape[2]} "
                f"from {_CHECKED_PX} x {_CHECKED_PX} pixels; Stable Diffusion v1 has {LATENT_CHANNELS} of an eighth of "
                "the side. Name SD v1's, or another one of its form."
            )
        decoded = vae.decode(moments[:, :LATENT_CHANNELS]).sample
    if not (moments.isfinite().all() and decoded.isfinite().all()):
        raise UserError(f"The VAE '{name}' gives numbers that are not finite; its weights are damaged.")
    return f"{name}: VAE, scaling factor {factor:g}, sha256 {digest[:12]}"
