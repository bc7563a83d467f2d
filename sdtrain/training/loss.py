"""The training objective: the UNet's target, and the weight of each timestep's loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sdtrain.config.sections import DiffusionConfig
from sdtrain.diffusion import NoiseSchedule


class Objective:
    """The training loss; by default SD v1's L_simple: the mean squared error of the noise, unweighted.

    `schedule` is the forward process; `weights`, (T,), float32, are each timestep's, None if all are 1.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu"):
        self._config = config
        self.schedule = NoiseSchedule(config, device)
        self.weights = min_snr_weights(self.schedule.snr, config) if config.min_snr_gamma else None

    def inputs(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the noisy latents and the UNet's target, both (B, 4, h, w), float32, from z_0, eps and t."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        if self._config.prediction_type == "epsilon":
            return noisy, noise
        return noisy, self.schedule.velocity(latents, noise, timesteps)

    def losses(
        self, predicted: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sample's mean squared error, weighted and unweighted, both (B,), float32.

        Training minimises the weighted mean; the unweighted one can be compared between runs.
        """
        unweighted = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        weighted = unweighted if self.weights is None else self.weights[timesteps] * unweighted
        return weighted, unweighted


def min_snr_weights(snr: torch.Tensor, config: DiffusionConfig) -> torch.Tensor:
    """min(SNR, gamma) in units of the latent's error, as weights of the predicted quantity's, (T,); `snr` is (T,).

    The noise's error is the latent's times SNR, the velocity's times SNR + 1: Hang et al. 2023, arXiv:2303.09556,
    section 3.4.
    """
    clipped = snr.clamp(max=config.min_snr_gamma)
    return clipped / snr if config.prediction_type == "epsilon" else clipped / (snr + 1.0)
