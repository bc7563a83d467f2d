"""Decodes some latents before they count as finished, as a wrong encoder raises no error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.dataset.config import EncodeConfig
from sdtrain.encode.vae import decode_latent
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# SD v1's VAE: 23.4 dB (sd 3.8) on COCO at 256 px and 26.1 (sd 4.2) on LAION-Aesthetics, by the card of
# stabilityai/sd-vae-ft-mse; the mean of 16 lies within 4 dB of that.
_SD_V1_CHANNELS, _SD_V1_PSNR_DB = (128, 256, 512, 512), 17.0
_STD_BOUNDS = (0.5, 1.7)
_BOUND_IS_FOR, _SPREAD_DB = 16, 4.0


@dataclass(frozen=True)
class DecodeQuality:
    """How well decoded latents match their images: mean and worst peak signal-to-noise ratio.

    `scaled_std` is the standard deviation of the latents times the scaling factor; training expects about 1.
    """

    num_samples: int
    psnr_db: float
    worst_psnr_db: float
    scaled_std: float

    def as_dict(self) -> dict[str, Any]:
        """For latents/info.json and the table."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def chosen_rows(num_rows: int, config: EncodeConfig, shard: int) -> set[int]:
    """The rows of a shard to check, always the same."""
    number = min(num_rows, config.check_samples)
    return set(np.random.default_rng(shard).choice(num_rows, number, replace=False).tolist())


def measure(
    vae: AutoencoderKL, moments: Sequence[NDArray[np.float16]], pixels: Sequence[NDArray[np.uint8]]
) -> DecodeQuality:
    """Decodes latents and compares the images.

    The samples' `moments` are (8, h, w) as read from the shard, their `pixels` (8h, 8w, 3) as encoded by `vae`.
    """
    rng, ratios, latents = np.random.default_rng(0), [], []
    for sample, image in zip(moments, pixels, strict=True):
        mean, logvar = np.split(sample.astype(np.float32), 2)
        error = np.square(decode_latent(vae, mean) - image).mean()
        ratios.append(10 * np.log10(255**2 / max(float(error), 1e-9)))
        drawn = mean + np.exp(0.5 * logvar.clip(-30, 20)) * rng.standard_normal(mean.shape, np.float32)
        latents.append(drawn.ravel())
    scaled = float(vae.config.scaling_factor) * np.concatenate(latents)
    return DecodeQuality(len(ratios), float(np.mean(ratios)), float(np.min(ratios)), float(scaled.std()))


def require_good(quality: DecodeQuality, config: EncodeConfig, vae: AutoencoderKL, where: str) -> None:
    """Raises UserError, with the PSNR found and expected, if the latents do not reproduce their images."""
    bound = psnr_bound_db(config, vae)
    if bound is None:
        return
    # Images differ by 4 dB (sd): a mean of few samples may be lower, by as many of its standard deviations as for 16.
    few = max(0.0, quality.num_samples**-0.5 - _BOUND_IS_FOR**-0.5)
    bound -= 4 * _SPREAD_DB * few
    low, high = _STD_BOUNDS
    problems = []
    if not quality.psnr_db >= bound:
        problems.append(f"their PSNR is {quality.psnr_db:.1f} dB, and at least {bound:.1f} is expected of this VAE")
    if not low <= quality.scaled_std <= high:
        problems.append(f"times the scaling factor their standard deviation is {quality.scaled_std:.2f} instead of 1")
    if problems:
        raise UserError(
            f"The latents of {where} do not give their images back: {quality.num_samples} were decoded, and "
            f"{'; '.join(problems)}. The pixels are not normalised as the VAE wants, or its weights are damaged. If "
            "your images are unusual, lower encode.min_psnr_db (0 switches the check off)."
        )


def psnr_bound_db(config: EncodeConfig, vae: AutoencoderKL) -> float | None:
    """The lowest accepted mean PSNR; None for an unknown VAE."""
    if config.min_psnr_db is not None:
        return config.min_psnr_db or None
    return _SD_V1_PSNR_DB if tuple(vae.config.block_out_channels) == _SD_V1_CHANNELS else None
