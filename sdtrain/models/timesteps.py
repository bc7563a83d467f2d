"""Spaces a sampler's timesteps over the noise schedule, and bounds their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np

from sdtrain.errors import UserError
from sdtrain.options import SamplerName

SpacingName = Literal["leading", "trailing", "linspace"]
_SD_V1_LENGTH = 1000


@dataclass(frozen=True)
class Spacing:
    """Where a sampler's timesteps lie, by the names of Lin et al. 2024 (arXiv:2305.08891, table 2).

    `leading` is CompVis' (`make_ddim_timesteps` in ldm/modules/diffusionmodules/util.py): every c-th of `length`
    timesteps, shifted by `offset`, with c = length // steps. Where steps do not divide `length`, CompVis takes as many
    more steps as fit (500 for 400 asked), and diffusers leaves out the noisy end (400 steps begin at 799). Here the
    stride stays c, as in diffusers, until a whole step would be left out; then steps are spread over all timesteps.

    Attributes:
        name: the spacing.
        length: timesteps of the noise schedule.
        offset: added to leading timesteps, 1 in SD v1.
        skips_lowest: the last step goes to no noise at all from above the lowest timestep, as DPM-Solver++ does.
    """

    name: SpacingName = "leading"
    length: int = _SD_V1_LENGTH
    offset: int = 1
    skips_lowest: bool = False

    @cached_property
    def max_steps(self) -> int:
        """The largest number of steps: beyond it timesteps would repeat, or leave the schedule."""
        return next(num for num in range(self.length, 0, -1) if self._is_possible(self._descending(num)))

    def timesteps(self, num_steps: int) -> list[int]:
        """The timesteps in descending order; UserError that names the range for a number out of it."""
        if not 1 <= num_steps <= self.max_steps:
            raise UserError(
                f"There cannot be {num_steps} sampling steps: this sampler and noise schedule take 1 to "
                f"{self.max_steps}."
            )
        return self._descending(num_steps)

    def _descending(self, num_steps: int) -> list[int]:
        num = num_steps + self.skips_lowest
        if self.name == "trailing":  # sliced, as rounding may add one; DPM-Solver++ has the same ones
            ends = np.arange(self.length, 0, -self.length / num_steps)[:num_steps]
            return [int(end) - 1 for end in ends.round()]
        if self.name == "linspace":
            ascending = [int(place) for place in np.linspace(0, self.length - 1, num).round()]
        else:
            stride = self.length // num
            places = (k * self.length // num if _misses_steps(self.length, num) else k * stride for k in range(num))
            ascending = [place + self.offset for place in places]
        return ascending[self.skips_lowest :][::-1]

    def _is_possible(self, timesteps: Sequence[int]) -> bool:
        return len(set(timesteps)) == len(timesteps) and min(timesteps) >= 0 and max(timesteps) < self.length


def spacing_of(name: SamplerName, config: Mapping[str, Any]) -> Spacing:
    """The spacing of a sampler over the noise schedule of a diffusers scheduler's config."""
    return Spacing(
        cast(SpacingName, config.get("timestep_spacing", "leading")),
        int(config.get("num_train_timesteps", _SD_V1_LENGTH)),
        int(config.get("steps_offset", 0)),
        name == "dpm",
    )


def fits_stride(timesteps: Sequence[int], length: int) -> bool:
    """Whether descending timesteps stay within a step of those that diffusers' PLMS and DDIM step through."""
    stride = length // len(timesteps)
    drifts = [abs(timesteps[0] - k * stride - at) for k, at in enumerate(timesteps)]
    return max(drifts) < stride


def are_respaced(name: SamplerName | None, num_steps: int) -> bool:
    """Whether so many steps are spread over SD v1's schedule as they were not before sdtrain did it itself."""
    return _misses_steps(_SD_V1_LENGTH, num_steps + (name == "dpm"))


def _misses_steps(length: int, num: int) -> bool:
    """Whether `num` strides of whole timesteps end a stride or more before the noisy end."""
    return length % num >= length // num
