"""What a training run shows of itself while it goes."""

from __future__ import annotations

from pydantic import Field, model_validator

from sdtrain.config.resuming import DecidesSamples, Free
from sdtrain.settings import Settings


class ValidationConfig(Settings):
    """The loss on samples that training never sees, at fixed timesteps with fixed noise."""

    num_samples: DecidesSamples[int] = Field(default=0, ge=0)
    """How many of the dataset's last samples are held out for it; 0: no validation, as in the original runs."""
    every: Free[int] = Field(default=1000, ge=1)
    """Optimizer steps between validations."""
    num_timesteps: Free[int] = Field(default=8, ge=1)
    """Timesteps at which every sample is tried, in the middle of as many equal parts of the noise schedule."""


class PreviewConfig(Settings):
    """Images of fixed prompts and seeds, sampled from the averaged weights during training."""

    every: Free[int] = Field(default=0, ge=0)
    """Optimizer steps between sheets; 0: none."""
    prompts: Free[tuple[str, ...]] = ()
    """One image for each; image i has seed i."""
    guidance_scale: Free[float] = Field(default=7.5, ge=0)
    """Strength of classifier-free guidance; 1 is none."""
    num_steps: Free[int] = Field(default=50, ge=1)
    """PLMS steps."""

    @model_validator(mode="after")
    def _has_prompts(self) -> PreviewConfig:
        if self.every and not self.prompts:
            raise ValueError("previews need prompts; name some, or set every to 0")
        return self


class TrackingConfig(Settings):
    """Where figures go beside log.csv and TensorBoard's event files, which are always written."""

    wandb_project: Free[str | None] = None
    """Project at Weights & Biases (`WANDB_MODE=offline` keeps the run on disk); null: not used."""
