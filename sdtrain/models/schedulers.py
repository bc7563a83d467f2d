"""Makes diffusers' samplers: PLMS, with which SD v1 was evaluated, DDIM and DPM-Solver++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from sdtrain.config import DiffusionConfig
from sdtrain.errors import UserError
from sdtrain.options import SamplerName


def sampling_scheduler(config: DiffusionConfig) -> PNDMScheduler | DDIMScheduler:
    """The sampler for a training config, with its noise schedule and prediction type.

    PNDM without its Runge-Kutta steps is diffusers' name for the PLMS sampler of CompVis/stable-diffusion,
    ldm/models/diffusion/plms.py. A model with zero terminal SNR must be sampled from its last timestep, where PLMS
    cannot begin, so it gets DDIM with trailing steps (Lin et al. 2024, arXiv:2305.08891, section 3.3).
    """
    common = {
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": config.prediction_type,
    }
    if config.zero_terminal_snr:
        return DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", **common)
    return PNDMScheduler(skip_prk_steps=True, **common)


def make_scheduler(name: SamplerName | None, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler for the noise schedule of a model's scheduler `config`.

    `name` is `plms` (Liu et al. 2022, arXiv:2202.09778), `ddim` (Song et al. 2021, arXiv:2010.02502, eta 0), or `dpm`
    (DPM-Solver++ of order 2, Lu et al. 2022, arXiv:2211.01095); None takes the one that fits the model. UserError if
    the sampler cannot begin at the schedule's start.
    """
    # With this key another class would use its own defaults, hence other timesteps than after an export.
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    from_pure_noise = bool(config.get("rescale_betas_zero_snr"))
    if name is None:
        name = "ddim" if from_pure_noise else "plms"
    if name == "plms":
        if from_pure_noise:
            raise UserError("PLMS cannot begin at the pure noise of zero terminal SNR. Sample with ddim or dpm.")
        return PNDMScheduler.from_config({**config, "skip_prk_steps": True})
    if name == "ddim":
        return DDIMScheduler.from_config({**config, "clip_sample": False})
    return DPMSolverMultistepScheduler.from_config({**config, "algorithm_type": "dpmsolver++", "solver_order": 2})
