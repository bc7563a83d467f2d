"""The formulas: noise schedule, posterior, forward process, guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.config import DiffusionConfig

Floats = NDArray[np.floating[Any]]


class NoiseSchedule:
    """alpha_bar of the forward process q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I).

    The betas are linear in their square root, computed and multiplied in float64 and stored in float32:
    `make_beta_schedule("linear")` and `register_schedule` in CompVis/stable-diffusion. `alphas_cumprod` is alpha_bar_t,
    (T,), and `snr` alpha_bar_t / (1 - alpha_bar_t), (T,), the signal's power over the noise's, both float32.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu"):
        roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=np.float64)
        alphas_cumprod = np.cumprod(1.0 - roots**2)
        if config.zero_terminal_snr:
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)

        def stored(values: Floats) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)

        self.alphas_cumprod = stored(alphas_cumprod)
        self.snr = stored(alphas_cumprod / (1.0 - alphas_cumprod))
        self._signal = stored(np.sqrt(alphas_cumprod))
        self._noise = stored(np.sqrt(1.0 - alphas_cumprod))

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, arXiv:2006.11239, eq. 4).

        Latents z_0 and noise eps are (B, 4, h, w), timesteps t (B,), int64.
        """
        signal, scale = self._at(timesteps)
        return signal * latents + scale * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0 (Salimans and Ho 2022, arXiv:2202.00512, app. D)."""
        signal, scale = self._at(timesteps)
        return signal * noise - scale * latents

    def _at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].view(shape), self._noise[timesteps].view(shape)


def zero_terminal_snr(alphas_cumprod: Floats) -> Floats:
    """Shifts and scales alpha_bar, (T,), so that its root ends at 0 and its first value stays.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, algorithm 1.
    """
    roots = np.sqrt(alphas_cumprod)
    return np.asarray(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2)


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """z_0 = scaling_factor * (mean + exp(clamp(log-variance, -30, 20) / 2) * eps), (B, 4, h, w) in float32.

    `DiagonalGaussianDistribution` in CompVis/stable-diffusion, ldm/modules/distributions/distributions.py. Moments:
    mean and log-variance, (B, 8, h, w). The scale (0.18215 for SD v1; makes the latents' variance about 1, Rombach et
    al. 2022, arXiv:2112.10752, appendix G) is applied only here, because the cache holds unscaled moments.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return scaling_factor * (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise)


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Returns eps + strength * offset: normal noise (B, 4, h, w) plus a constant for each latent channel, (B, 4, 1, 1).

    Plain noise leaves an image's mean visible at every timestep, so a model never learns to make it (Guttenberg 2023,
    "Diffusion with Offset Noise", crosslabs.org).
    """
    return noise + strength * offset if strength else noise


def drop_captions(captions: Sequence[str], uniforms: Sequence[float], dropout: float) -> list[str]:
    """Replaces a caption by "" where its uniform random number is below `dropout`.

    SD v1 drops the string, not the embedding (`ucg_training` in Stability-AI/stablediffusion,
    ldm/models/diffusion/ddpm.py), for classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, algorithm 1).
    """
    return ["" if uniform < dropout else caption for caption, uniform in zip(captions, uniforms, strict=True)]


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: eps_u + scale * (eps_c - eps_u), where scale 1 is no guidance.

    `p_sample_plms` in CompVis/stable-diffusion, ldm/models/diffusion/plms.py; Ho and Salimans (2022), eq. 6, use w =
    scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
