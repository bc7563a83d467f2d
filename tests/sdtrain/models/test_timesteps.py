import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from sdtrain.config import DiffusionConfig
from sdtrain.errors import UserError
from sdtrain.models.schedulers import begin_steps, check_num_steps, num_left, sampling_scheduler
from sdtrain.models.timesteps import Spacing, are_respaced, spacing_of

SD_V1 = sampling_scheduler(DiffusionConfig()).config
TERMINAL = sampling_scheduler(DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)).config


@pytest.mark.parametrize(
    ("name", "config", "most"),
    [("plms", SD_V1, 999), ("ddim", SD_V1, 999), ("dpm", SD_V1, 998), ("ddim", TERMINAL, 1000)],
)
def test_every_allowed_number_has_that_many_timesteps_from_the_noisy_end(name, config, most):
    spacing = spacing_of(name, config)
    assert spacing.max_steps == most
    for num in range(1, most + 1):
        timesteps = np.array(spacing.timesteps(num))
        stride = 1000 / (num + (name == "dpm"))
        assert len(timesteps) == num
        assert (np.diff(timesteps) < 0).all()
        assert 0 <= timesteps[-1] <= stride + 1
        assert 1000 - 2 * stride < timesteps[0] <= 999  # no whole step is left out
        assert num == 1 or np.abs(np.diff(timesteps) + stride).max() <= 1


@pytest.mark.parametrize("num", [0, 1000, 1001, 1500, -3])
@pytest.mark.parametrize("name", ["plms", "ddim", None])
def test_other_numbers_are_a_sentence_with_the_range(name, num):
    with pytest.raises(UserError, match=f"There cannot be {num} sampling steps: .* take 1 to 999"):
        check_num_steps(name, SD_V1, num)
    with pytest.raises(UserError, match="1 to 998"):
        begin_steps("dpm", SD_V1, 999)


# CompVis: range(0, 1000, 1000 // steps) + 1, which where the steps divide 1000 has as many as were asked for.
@pytest.mark.parametrize("num", [num for num in range(1, 1000) if 1000 % num == 0])
def test_steps_that_divide_the_schedule_are_those_of_compvis(num):
    assert Spacing().timesteps(num) == [at + 1 for at in range(0, 1000, 1000 // num)][::-1]


@pytest.mark.parametrize(
    ("name", "kind"), [("plms", PNDMScheduler), ("ddim", DDIMScheduler), ("dpm", DPMSolverMultistepScheduler)]
)
def test_usual_numbers_are_those_of_diffusers(name, kind):
    usual = [num for num in range(1, 999) if not are_respaced(name, num)]
    assert set(range(1, 31)) <= set(usual)
    for num in usual:
        theirs = kind.from_config({key: value for key, value in SD_V1.items() if key != "_use_default_values"})
        theirs.set_timesteps(num)
        assert begin_steps(name, SD_V1, num)[1] == theirs.timesteps.tolist()


def test_four_hundred_steps_begin_at_the_noisy_end():
    assert Spacing().timesteps(400)[:3] == [998, 996, 993]
    assert are_respaced("plms", 400)
    assert begin_steps("dpm", SD_V1, 400)[1][0] == 998


def test_strength_leaves_as_many_steps_as_in_compvis():
    assert [num_left(50, strength) for strength in (0.75, 0.5, 0.02, 1.0)] == [37, 25, 1, 50]
    assert begin_steps("plms", SD_V1, 10, 0.3)[1] == [201, 101, 101, 1]
    assert begin_steps("dpm", SD_V1, 24, 0.25)[1] == [241, 201, 161, 121, 81, 41]
