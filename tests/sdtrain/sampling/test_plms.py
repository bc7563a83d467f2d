"""The sampler against PLMS written down from the formulas.

Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv:2202.09778, eq. 9 and 12), with the
timesteps and ends of CompVis/stable-diffusion, ldm/models/diffusion/plms.py: every 20th step, shifted by one; the last
step goes to alpha_bar of timestep 0; the first one is a Heun step with two calls.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdtrain.config import DiffusionConfig, load_config
from sdtrain.formats.export import write_pipeline
from sdtrain.models.unet import build_unet
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from tests.training_fixtures import write_config, write_models


def plms(epsilon, latents, alphas_cumprod, num_steps):
    """Latents at the end, in float64, and the timesteps at which epsilon was asked."""
    length = len(alphas_cumprod)
    timesteps = np.arange(0, length, length // num_steps)[::-1] + 1
    before, asked = [], []

    def ask(x, t):
        asked.append(int(t))
        return epsilon(x, t)

    def to(x, noise, t, alpha_prev):
        alpha = alphas_cumprod[t]
        start = (x - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha)
        return np.sqrt(alpha_prev) * start + np.sqrt(1 - alpha_prev) * noise

    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        alpha_prev = alphas_cumprod[0] if last else alphas_cumprod[timesteps[i + 1]]
        noise = ask(latents, t)
        if not before:
            following = to(latents, noise, t, alpha_prev)
            estimate = (noise + ask(following, timesteps[min(i + 1, len(timesteps) - 1)])) / 2
        else:
            weights = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}[min(len(before), 3)]
            history = [noise, *before[::-1]][: len(weights)]
            estimate = sum(w * e for w, e in zip(weights, history, strict=True)) / sum(weights)
        before.append(noise)
        latents = to(latents, estimate, t, alpha_prev)
    return latents, asked


def toy(latents, timestep):
    """A smooth nonlinear function that differs in every element and at every timestep."""
    return 0.6 * latents / (1 + 0.2 * latents**2) + 0.3 * np.cos(0.004 * timestep + latents)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    models = write_models(root / "models")
    config = load_config(str(write_config(root / "c.yaml", models, root / "data")))
    folder = write_pipeline(build_unet(config.unet, config.latent_size), config, root / "out")
    return load_networks(folder, "cpu", torch.float32)


@pytest.mark.parametrize("num_steps", [50, 10])
def test_the_sampler_is_plms(networks, num_steps):
    asked = []

    def unet(latents, timestep, context):
        asked.append(int(timestep))
        return SimpleNamespace(sample=torch.from_numpy(toy(latents.double().numpy(), int(timestep))))

    config = DiffusionConfig()
    roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted, wanted_asked = plms(toy, start.double().numpy(), np.cumprod(1 - roots**2), num_steps)
    found = Sampler(replace(networks, unet=unet))._denoise(["a", "a"], start, SampleSettings(1.0, num_steps))
    assert asked == wanted_asked
    assert len(asked) == num_steps + 1
    assert np.abs(found.numpy() - wanted).max() < 2e-4 * np.abs(wanted).max()  # the scheduler works in float32
