"""Makes diffusers' samplers: PLMS, with which SD v1 was evaluated, DDIM and DPM-Solver++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from sdtrain.config import DiffusionConfig
from sdtrain.errors import UserError
from sdtrain.models.timesteps import fits_stride, spacing_of
from sdtrain.options import SamplerName

_OWN_SIGMAS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings of a published DPM-Solver++ that choose the timesteps otherwise."""


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
    name = _fitting(name, config)
    if name == "plms":
        return PNDMScheduler.from_config({**config, "skip_prk_steps": True})
    if name == "ddim":
        return DDIMScheduler.from_config({**config, "clip_sample": False})
    return DPMSolverMultistepScheduler.from_config({**config, "algorithm_type": "dpmsolver++", "solver_order": 2})


def check_num_steps(name: SamplerName | None, config: Mapping[str, Any], num_steps: int) -> None:
    """UserError that names the range if the sampler cannot take so many steps, or not begin at the schedule's start."""
    spacing_of(_fitting(name, config), config).timesteps(num_steps)


def begin_steps(
    name: SamplerName | None, config: Mapping[str, Any], num_steps: int, strength: float = 1.0
) -> tuple[Any, list[int]]:
    """A scheduler for sampling, and the timesteps at which to ask the UNet and then to step, in order.

    With a `strength` below 1 only the last int(strength * num_steps) steps are taken, from an image with the noise of
    the first of their timesteps. CompVis/stable-diffusion, scripts/img2img.py, takes as many steps, but adds the noise
    of one timestep more. PLMS begins there as elsewhere, with a Heun step. UserError as for `check_num_steps`, and for
    a strength that leaves no step.
    """
    scheduler, fitting = make_scheduler(name, config), _fitting(name, config)
    timesteps = spacing_of(fitting, scheduler.config).timesteps(num_steps)
    left = timesteps[num_steps - num_left(num_steps, strength) :]
    scheduler.set_timesteps(num_steps)
    if fitting == "dpm":
        if scheduler.timesteps.tolist() != timesteps and not any(scheduler.config.get(key) for key in _OWN_SIGMAS):
            scheduler.set_timesteps(timesteps=timesteps)
        return scheduler, scheduler.timesteps.tolist()[-len(left) :]
    fits = fits_stride(timesteps, scheduler.config.num_train_timesteps)
    if fitting == "ddim":
        return scheduler if fits else _exact_ddim(scheduler.config, timesteps), left
    # The Heun step asks the second one twice.
    return scheduler if fits else _spread_plms(scheduler.config, num_steps, left), [*left[:2], *left[1:]]


def num_left(num_steps: int, strength: float) -> int:
    """Steps that are taken at a strength of image-to-image; UserError if there are none, or strength is out of range.

    As in CompVis and diffusers, int(strength * num_steps).
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength:g} is out of range: above 0 (the image stays) up to 1 (nearly all noise).")
    if not int(num_steps * strength):
        raise UserError(
            f"strength {strength:g} of {num_steps} steps leaves none to take; it has to be {1 / num_steps:.3g} at "
            "least."
        )
    return int(num_steps * strength)


class _SpreadPlms(PNDMScheduler):
    """PLMS whose steps go from each timestep of `walk` to the next; diffusers' go along a constant stride."""

    walk: Sequence[int] = ()

    def _get_prev_sample(self, sample: Any, timestep: Any, prev_timestep: Any, model_output: Any) -> Any:
        step = max(self.counter - 1, 0)  # the Heun step counts twice
        here, to = [*self.walk, -1][step : step + 2]
        return super()._get_prev_sample(sample, here, to, model_output)


def _spread_plms(config: Mapping[str, Any], num_steps: int, walk: Sequence[int]) -> PNDMScheduler:
    scheduler: _SpreadPlms = _SpreadPlms.from_config(config)
    scheduler.walk = walk
    scheduler.set_timesteps(num_steps)
    return scheduler


def _exact_ddim(config: Mapping[str, Any], timesteps: Sequence[int]) -> DPMSolverMultistepScheduler:
    """DDIM for any timesteps, as the DPM-Solver of order 1 (Lu et al. 2022, arXiv:2206.00927, section 4.1)."""
    order = {"algorithm_type": "dpmsolver++", "solver_order": 1}
    end = "zero" if config["set_alpha_to_one"] else "sigma_min"
    scheduler = DPMSolverMultistepScheduler.from_config({**config, **order, "final_sigmas_type": end})
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


def _fitting(name: SamplerName | None, config: Mapping[str, Any]) -> SamplerName:
    from_pure_noise = bool(config.get("rescale_betas_zero_snr"))
    if name == "plms" and from_pure_noise:
        raise UserError("PLMS cannot begin at the pure noise of zero terminal SNR. Sample with ddim or dpm.")
    return name or ("ddim" if from_pure_noise else "plms")
