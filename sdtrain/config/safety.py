"""What keeps a training run safe: checkpoints, and guards against steps that would ruin it or never end."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sdtrain.config.resuming import Free
from sdtrain.settings import Settings


class CheckpointConfig(Settings):
    """When the training state is written, and how much of it stays."""

    every: Free[int] = Field(default=5000, ge=1)
    """Optimizer steps between checkpoints."""
    keep_last: Free[int] = Field(default=3, ge=2)
    """Newest checkpoints that stay; at least two, in case the newest is damaged."""
    keep_every: Free[int] = Field(default=0, ge=0)
    """Checkpoints at multiples of this many steps stay for ever; a multiple of `every`. 0: none do."""
    mode: Free[Literal["async", "sync"]] = "async"
    """async: training waits only while the state is copied to host memory (16 bytes a parameter, shared by the ranks)
    and goes on while a thread writes it. sync: training waits for the disk."""

    @model_validator(mode="after")
    def _permanent_ones_are_made(self) -> CheckpointConfig:
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of every {self.every}, so there would be no checkpoint "
                "to keep at most of its steps; set it to a multiple"
            )
        return self


class GuardConfig(Settings):
    """What happens at a step that would ruin the run, or that does not end."""

    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    """A gradient with NaN or infinity: stop, or leave the weights as they are and go on with the next batch. `skip`
    reads the gradient's norm from the device in every optimizer step. In fp16 the step is first repeated with smaller
    loss scales."""
    max_grad_norm_ratio: Free[float] = Field(default=0.0, ge=0)
    """A gradient norm above this many times the median of the last `norm_window` ones is a spike; 0: no step is, as in
    the original runs. Above 0 the norm is read from the device in every optimizer step."""
    on_spike: Free[Literal["stop", "skip"]] = "skip"
    """What happens at a spike."""
    norm_window: Free[int] = Field(default=100, ge=2)
    """Applied steps whose norms make the median; no step is a spike before there were that many."""
    max_skips_in_a_row: Free[int] = Field(default=10, ge=1)
    """Training stops when so many steps in a row were skipped."""
    stall_timeout_s: Free[float] = Field(default=600, ge=0)
    """Seconds without any progress on a rank after which it says which ranks are behind, and ends the job; 0: never.
    The first steps compile and are slow: leave room."""

    @property
    def reads_every_norm(self) -> bool:
        """Whether the gradient's norm is read from the device in every step."""
        return self.on_nonfinite == "skip" or self.max_grad_norm_ratio > 0
