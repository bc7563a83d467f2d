import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdtrain.config import DiffusionConfig, TrainConfig
from sdtrain.errors import UserError
from sdtrain.loading.sample_plan import sample_noise
from sdtrain.settings import parse_settings
from sdtrain.training.loss import Objective

TIMESTEPS = torch.tensor([0, 3, 250, 700, 999])


def random_batch():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(3))


def oracle(config):
    """Diffusers' scheduler of the same settings."""
    return DDPMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )


def test_sd_v1s_loss_is_the_plain_error_of_the_noise():
    latents, noise, predicted = random_batch()
    objective = Objective(DiffusionConfig())
    noisy, target = objective.inputs(latents, noise, TIMESTEPS)
    assert target is noise
    torch.testing.assert_close(noisy, objective.schedule.add_noise(latents, noise, TIMESTEPS), rtol=0, atol=0)
    weighted, unweighted = objective.losses(predicted, target, TIMESTEPS)
    assert weighted is unweighted
    assert unweighted.shape == (5,)
    torch.testing.assert_close(weighted.mean(), F.mse_loss(predicted, noise))


def test_the_loss_is_float32_whatever_comes_in():
    prediction, target = torch.full((2, 4, 8, 8), 0.5, dtype=torch.bfloat16), torch.zeros(2, 4, 8, 8)
    for losses in Objective(DiffusionConfig(min_snr_gamma=5)).losses(prediction, target, TIMESTEPS[:2]):
        assert losses.dtype == torch.float32
    assert losses.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_velocity_is_the_target_that_diffusers_gives(zero_terminal_snr):
    latents, noise, _ = random_batch()
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
    noisy, target = Objective(config).inputs(latents, noise, TIMESTEPS)
    scheduler = oracle(config)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, TIMESTEPS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, TIMESTEPS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_agree_with_diffusers_example(prediction_type):
    latents, noise, predicted = random_batch()
    config = DiffusionConfig(prediction_type=prediction_type, min_snr_gamma=5.0)
    objective = Objective(config)
    _, target = objective.inputs(latents, noise, TIMESTEPS)
    weighted, unweighted = objective.losses(predicted, target, TIMESTEPS)
    snr = compute_snr(oracle(config), TIMESTEPS)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor * unweighted
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(unweighted, (predicted - target).square().mean(dim=(1, 2, 3)))


def test_both_predictions_weigh_the_latents_error_alike():
    """Whatever is predicted, min(SNR, gamma) times the error of the latent that follows from it is minimised."""
    latents, noise, error = random_batch()
    for prediction_type in ("epsilon", "v_prediction"):
        objective = Objective(DiffusionConfig(prediction_type=prediction_type, min_snr_gamma=5.0))
        noisy, target = objective.inputs(latents, noise, TIMESTEPS)
        weighted, _ = objective.losses(target + 0.01 * error, target, TIMESTEPS)
        alpha = objective.schedule.alphas_cumprod[TIMESTEPS].double().view(-1, 1, 1, 1)
        predicted = (target + 0.01 * error).double()
        if prediction_type == "epsilon":
            implied = (noisy.double() - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        else:
            implied = alpha.sqrt() * noisy.double() - (1 - alpha).sqrt() * predicted
        clipped = objective.schedule.snr[TIMESTEPS].double().clamp(max=5.0)
        expected = clipped * (implied - latents.double()).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(weighted.double(), expected, rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_terminal_snr": True}, "predicting the noise teaches nothing; set prediction_type to v_prediction"),
        (
            {"zero_terminal_snr": True, "prediction_type": "v_prediction", "min_snr_gamma": 5},
            "would never be learned; use one of the two",
        ),
        ({"prediction_type": "sample"}, "prediction_type' is 'sample'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_settings(TrainConfig, {"name": "mine", "steps": 9, "diffusion": settings}, "mine.yaml")


def test_the_offset_comes_from_the_samples_own_stream_and_shifts_nothing_in_it():
    def again(seed, step, uid):
        import hashlib

        key = hashlib.blake2b(f"noise {seed} {step} {uid}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    drawn, stream = sample_noise(42, 7, "ab", 1000, (4, 8, 8)), again(42, 7, "ab")
    assert (drawn.timestep, drawn.drop) == (stream.integers(1000), stream.random())
    assert np.array_equal(drawn.posterior, stream.standard_normal((4, 8, 8), np.float32))
    assert np.array_equal(drawn.noise, stream.standard_normal((4, 8, 8), np.float32))
    assert np.array_equal(drawn.offset, stream.standard_normal((4, 1, 1), np.float32))
    assert not np.array_equal(drawn.offset, sample_noise(42, 8, "ab", 1000, (4, 8, 8)).offset)
