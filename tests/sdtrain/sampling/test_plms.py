"""The sampler against PLMS and DDIM written down from the formulas.

Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv:2202.09778, eq. 9 and 12), with the
timesteps and ends of CompVis/stable-diffusion, ldm/models/diffusion/plms.py: every 20th step, shifted by one; the last
step goes to alpha_bar of timestep 0; the first one is a Heun step with two calls.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdtrain.config import DiffusionConfig, load_config
from sdtrain.formats.export import write_pipeline
from sdtrain.models.unet import build_unet
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from sdtrain.sampling.start_image import StartImage
from tests.training_fixtures import write_config, write_models


def evenly(length, num_steps):
    """Every c-th timestep; where that would leave out a whole step at the noisy end, spread over all."""
    stride = length // num_steps
    places = np.arange(num_steps) * stride
    if length - num_steps * stride >= stride:
        places = np.arange(num_steps) * length // num_steps
    return places[::-1] + 1


def plms(epsilon, latents, alphas_cumprod, timesteps):
    """Latents at the end, in float64, and the timesteps at which epsilon was asked."""
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


def ddim(epsilon, latents, alphas_cumprod, timesteps):
    """As `plms`, by Song et al. 2021 (arXiv:2010.02502), eq. 12 with sigma 0."""
    for t, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        alpha, alpha_prev, noise = alphas_cumprod[t], alphas_cumprod[following], epsilon(latents, t)
        start = (latents - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha)
        latents = np.sqrt(alpha_prev) * start + np.sqrt(1 - alpha_prev) * noise
    return latents, [int(t) for t in timesteps]


ALPHAS_CUMPROD = np.cumprod(
    1 - np.linspace(DiffusionConfig().beta_start ** 0.5, DiffusionConfig().beta_end ** 0.5, 1000) ** 2
)


@pytest.mark.parametrize("num_steps", [50, 10, 7, 60, 400, 999])
@pytest.mark.parametrize(("name", "formula"), [("plms", plms), ("ddim", ddim)])
def test_the_sampler_is_its_formula(networks, name, formula, num_steps):
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted, wanted_asked = formula(toy, start.double().numpy(), ALPHAS_CUMPROD, evenly(1000, num_steps))
    found, asked = sampled(networks, start, SampleSettings(1.0, num_steps, name))
    assert asked == wanted_asked
    assert len(asked) == num_steps + (name == "plms")
    assert np.abs(found.numpy() - wanted).max() < 2e-4 * np.abs(wanted).max()  # the scheduler works in float32


@pytest.mark.parametrize(
    ("num_steps", "strength", "num_taken"), [(50, 0.75, 37), (50, 0.5, 25), (60, 0.5, 30), (9, 0.2, 1)]
)
@pytest.mark.parametrize(("name", "formula"), [("plms", plms), ("ddim", ddim)])
def test_strength_takes_the_last_steps_from_an_image_with_their_noise(
    networks, name, formula, num_steps, strength, num_taken
):
    noise, image = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    timesteps = evenly(1000, num_steps)[-num_taken:]
    signal = ALPHAS_CUMPROD[timesteps[0]]
    noisy = np.sqrt(signal) * image.numpy() + np.sqrt(1 - signal) * noise.numpy()
    wanted, wanted_asked = formula(toy, noisy, ALPHAS_CUMPROD, timesteps)
    settings = SampleSettings(1.0, num_steps, name, start=StartImage(Path("photo.png"), "", strength))
    found, asked = sampled(networks, noise.float(), settings, image.float())
    if num_taken == 1:
        assert asked == [1]  # a single step has no following timestep to ask at
        return
    assert asked == wanted_asked
    assert np.abs(found.numpy() - wanted).max() < 2e-4 * np.abs(wanted).max()


def sampled(networks, noise, settings, image=None):
    """Final latents, and the timesteps at which the UNet was asked."""
    asked = []

    def unet(latents, timestep, context):
        asked.append(int(timestep))
        return SimpleNamespace(sample=torch.from_numpy(toy(latents.double().numpy(), int(timestep))))

    found = Sampler(replace(networks, unet=unet))._denoise(["a", "a"], noise, settings, image)
    return found, asked
