import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdtrain.config import DiffusionConfig
from sdtrain.diffusion import NoiseSchedule, drop_captions, guide, offset_noise, sample_posterior

ORACLE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_schedule_agrees_with_diffusers():
    schedule = NoiseSchedule(DiffusionConfig())
    torch.testing.assert_close(schedule.alphas_cumprod, ORACLE.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)


def test_add_noise_agrees_with_diffusers():
    latents, noise, timesteps = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    ours = NoiseSchedule(DiffusionConfig()).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, ORACLE.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-4)


def test_posterior_is_diffusers_times_the_factor_once():
    moments, noise = torch.randn(3, 8, 4, 4), torch.randn(3, 4, 4, 4)
    theirs = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(sample_posterior(moments, noise, 0.18215), 0.18215 * (theirs.mean + theirs.std * noise))


def test_extreme_log_variances_stay_finite():
    moments = torch.tensor([0.0, 1000.0]).repeat_interleave(4).view(1, 8, 1, 1).half()
    assert torch.isfinite(sample_posterior(moments, torch.ones(1, 4, 1, 1), 1.0)).all()


def test_velocity_agrees_with_diffusers():
    latents, noise, timesteps = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999])
    ours = NoiseSchedule(DiffusionConfig()).velocity(latents, noise, timesteps)
    torch.testing.assert_close(ours, ORACLE.get_velocity(latents, noise, timesteps), rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_agrees_with_diffusers():
    oracle = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    schedule = NoiseSchedule(DiffusionConfig(zero_terminal_snr=True, prediction_type="v_prediction"))
    torch.testing.assert_close(schedule.alphas_cumprod, oracle.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert (schedule.alphas_cumprod[-1], schedule.snr[-1]) == (0, 0)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)
    noise = torch.randn(1, 4, 8, 8)
    assert torch.equal(schedule.add_noise(torch.randn(1, 4, 8, 8), noise, torch.tensor([999])), noise)


def test_offset_noise_shifts_whole_channels():
    noise, offset = torch.randn(64, 4, 32, 32), torch.randn(64, 4, 1, 1)
    assert offset_noise(noise, offset, 0.0) is noise
    shifted = offset_noise(noise, offset, 0.1)
    torch.testing.assert_close(shifted - noise, (0.1 * offset).expand_as(noise), rtol=0, atol=1e-6)
    assert shifted.mean(dim=(2, 3)).std().item() == pytest.approx((0.1**2 + 1 / 32**2) ** 0.5, rel=0.15)


def test_captions_below_the_dropout_become_empty():
    assert drop_captions(["a", "b", "c"], [0.05, 0.1, 0.9], 0.1) == ["", "b", "c"]
    assert drop_captions(["a"], [0.0], 0.0) == ["a"]


def test_guidance_scale_one_is_the_conditional_prediction():
    u, c = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    torch.testing.assert_close(guide(u, c, 0.0), u)
    torch.testing.assert_close(guide(u, c, 3.0), 3 * c - 2 * u)
