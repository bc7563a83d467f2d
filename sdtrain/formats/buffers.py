"""The tensors of a CompVis file that are no weights: of the noise schedule and of the average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sdtrain.diffusion import Floats, zero_terminal_snr

_SMALLEST = 1e-20
UNCOUNTED = -1
"""What `LitEma` in CompVis/stable-diffusion, ldm/modules/ema.py, has for the number of updates if it counts none."""


def schedule_buffers(scheduler: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The twelve buffers of the noise schedule, each (T,), float32, computed in float64.

    `DDPM.register_schedule` in CompVis/stable-diffusion, ldm/models/diffusion/ddpm.py, with v_posterior = 0; the
    posterior is q(z_{t-1} | z_t, z_0) of Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7.

    Args:
        scheduler: config of a diffusers scheduler with scaled-linear betas.
    """
    start, end, length = (scheduler[name] for name in ("beta_start", "beta_end", "num_train_timesteps"))
    betas: Floats = np.linspace(start**0.5, end**0.5, length, dtype=np.float64) ** 2
    if scheduler.get("rescale_betas_zero_snr"):
        rescaled = zero_terminal_snr(np.cumprod(1.0 - betas))
        betas = 1.0 - rescaled / np.append(1.0, rescaled[:-1])
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    before, noise = np.append(1.0, alpha_bar[:-1]), 1.0 - alpha_bar
    variance = betas * (1.0 - before) / noise
    with np.errstate(divide="ignore"):  # nothing of the latent is left at the end of zero terminal SNR
        values = {
            "betas": betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(noise),
            "log_one_minus_alphas_cumprod": np.log(noise),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alpha_bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alpha_bar - 1.0),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, _SMALLEST)),
            "posterior_mean_coef1": betas * np.sqrt(before) / noise,
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / noise,
        }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def average_buffers(decay: float, num_updates: int | None) -> dict[str, torch.Tensor]:
    """What a file says of the average itself: its largest decay, and how often it was updated, where that is known."""
    return {
        "model_ema.decay": torch.tensor(decay, dtype=torch.float32),
        "model_ema.num_updates": torch.tensor(UNCOUNTED if num_updates is None else num_updates, dtype=torch.int32),
    }


def position_ids(num_positions: int) -> torch.Tensor:
    """The positions of tokens, (1, 77), int64: old versions of transformers count them among CLIP's tensors."""
    return torch.arange(num_positions)[None]
