"""The formulas: noise schedule, posterior, forward process, loss, guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sdtrain.config import DiffusionConfig


class NoiseSchedule:
    """alpha_bar of the forward process q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I).

    The betas are linear in their square root, computed and multiplied in float64 and stored in float32:
    `make_beta_schedule("linear")` and `register_schedule` in CompVis/stable-diffusion.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu"):
        roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=np.float64)
        alphas_cumprod = np.cumprod(1.0 - roots**2)
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod.astype(np.float32)).to(device)
        self._signal = torch.from_numpy(np.sqrt(alphas_cumprod).astype(np.float32)).to(device)
        self._noise = torch.from_numpy(np.sqrt(1.0 - alphas_cumprod).astype(np.float32)).to(device)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, arXiv:2006.11239, eq. 4).

        Args:
            latents: z_0, (B, 4, h, w).
            noise: eps, the same shape.
            timesteps: t, (B,), int64.
        """
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape) * latents + self._noise[timesteps].view(shape) * noise


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """z_0 = scaling_factor * (mean + exp(clamp(log-variance, -30, 20) / 2) * eps), (B, 4, h, w) in float32.

    `DiagonalGaussianDistribution` in CompVis/stable-diffusion, ldm/modules/distributions/distributions.py; the scale
    (0.18215 for SD v1) is applied here and nowhere else, because the cache holds unscaled moments.

    Args:
        moments: mean and log-variance, (B, 8, h, w).
        noise: standard normal, (B, 4, h, w).
        scaling_factor: makes the latents' variance about 1 (Rombach et al. 2022, arXiv:2112.10752, appendix G).
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return scaling_factor * (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise)


def noise_loss(prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise, in float32 (Ho et al. 2020, eq. 14: L_simple)."""
    return F.mse_loss(prediction.float(), noise.float())


def drop_captions(captions: Sequence[str], chances: Sequence[float], dropout: float) -> list[str]:
    """Replaces a caption by "" where its uniform chance is below `dropout`, before it is tokenised.

    The string, not the embedding, is what SD v1 drops (`ucg_training` in Stability-AI/stablediffusion,
    ldm/models/diffusion/ddpm.py), for classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, algorithm 1).
    """
    return ["" if chance < dropout else caption for caption, chance in zip(captions, chances, strict=True)]


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: eps_u + scale * (eps_c - eps_u), where scale 1 is no guidance.

    `p_sample_plms` in CompVis/stable-diffusion, ldm/models/diffusion/plms.py; Ho and Salimans (2022), eq. 6,
    count w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)


def learning_rate(step: int, lr: float, warmup_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear from 1e-6 of `lr` up to `lr`, then constant.

    `LambdaLinearScheduler` in CompVis/stable-diffusion, ldm/lr_scheduler.py, with f_start 1e-6. A pure function of
    the optimizer step, so neither the number of ranks nor a resume can shift it.
    """
    if step >= warmup_steps:
        return lr
    return lr * (1e-6 + (1.0 - 1e-6) * step / warmup_steps)
