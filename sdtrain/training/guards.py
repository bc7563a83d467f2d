"""Refuses optimizer steps whose gradient is not finite or far above the usual."""

from __future__ import annotations

import math
import statistics

import torch

from sdtrain.config.sections import GuardConfig
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import GuardState

ADVICE = (
    "Lower optimizer.lr, set optimizer.max_grad_norm to 1, look for damaged latents, or let such steps be skipped "
    "(guard.on_nonfinite, guard.on_spike, guard.max_skips_in_a_row)."
)


class StepGuard:
    """Judges every optimizer step by the norm of its gradient, before it is applied.

    The norm is of the mean gradient over all ranks, so all ranks reach the same verdict. A skipped step leaves weights,
    moments and average unchanged but still counts, so learning rate and data advance as usual.

    Attributes:
        applied: whether the last step was applied.
        must_repeat: whether it overflowed and is repeated with a smaller loss scale.
        is_finite: whether its gradient was finite, if its norm was read.
        norm: that norm, NaN if it was not finite; None if norms are not read.
    """

    def __init__(self, config: GuardConfig):
        self._config = config
        self.state = GuardState()
        self.applied, self.must_repeat, self.is_finite = True, False, True
        self.norm: float | None = None
        self._refusal = ""
        self._any_nonfinite: torch.Tensor | None = None

    def note(self, norm: torch.Tensor) -> None:
        """Records for `check`, without waiting for the device, whether a norm is of a gradient that is not finite.

        Such a norm is infinite, NaN or negative: versions of DeepSpeed differ in it.
        """
        norm = norm.detach()
        is_nonfinite = ~(torch.isfinite(norm) & (norm >= 0))
        self._any_nonfinite = is_nonfinite if self._any_nonfinite is None else self._any_nonfinite | is_nonfinite

    def may_apply(self, norm: float, can_rescale: bool = False) -> bool:
        """Decides on a step by its gradient's norm, negative or not finite if the gradient is not finite."""
        self.is_finite = math.isfinite(norm) and norm >= 0
        self.norm = norm if self.is_finite else math.nan
        self._refusal = self._spike(norm) if self.is_finite else "its gradient is not finite"
        self.applied = not self._refusal
        self.must_repeat = can_rescale and not self.is_finite
        if self.applied:
            self.state = self.state.model_copy(update={"num_in_a_row": 0, "recent_norms": self._recent_with(norm)})
        elif not self.must_repeat:
            counts = {name: getattr(self.state, name) + 1 for name in ("num_skipped", "num_in_a_row")}
            self.state = self.state.model_copy(update=counts)
        return self.applied

    def after_step(self, step: int) -> str:
        """Returns a message if step `step` was not applied, else ""; UserError if the policy is to stop."""
        if self.applied:
            return ""
        if self._stops():
            raise UserError(
                f"Step {step} was not applied: {self._refusal}. Training stopped, after {self.state.num_in_a_row} such "
                f"steps in a row; the last checkpoint is from before. {ADVICE}"
            )
        return f"step {step} skipped: {self._refusal} ({self.state.num_skipped} skipped so far)"

    def check(self, step: int) -> None:
        """Waits for the device and checks all norms noted so far; UserError if one was not finite."""
        if self._any_nonfinite is not None and bool(self._any_nonfinite):
            raise UserError(
                f"A gradient was not finite at or shortly before step {step}. Training stopped; the last checkpoint is "
                f"from before. {ADVICE}"
            )

    def _recent_with(self, norm: float) -> tuple[float, ...]:
        if not self._config.max_grad_norm_ratio:
            return ()
        return (*self.state.recent_norms, norm)[-self._config.norm_window :]

    def _spike(self, norm: float) -> str:
        ratio, recent = self._config.max_grad_norm_ratio, self.state.recent_norms
        if not ratio or len(recent) < self._config.norm_window:
            return ""
        median = statistics.median(recent)
        if norm <= ratio * median:
            return ""
        return (
            f"its gradient's norm is {norm:.4g}, more than {ratio:g} times {median:.4g}, the median of the last "
            f"{len(recent)}"
        )

    def _stops(self) -> bool:
        policy = self._config.on_spike if self.is_finite else self._config.on_nonfinite
        return policy == "stop" or self.state.num_in_a_row >= self._config.max_skips_in_a_row
