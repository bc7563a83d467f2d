"""The model card's chain of runs: sd-v1-1 (256, then 512) -> sd-v1-2 -> sd-v1-3, -4 or -5, each from the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.settings import nearest

RunName = Literal["sd-v1-1-256", "sd-v1-1-512", "sd-v1-2", "sd-v1-3", "sd-v1-4", "sd-v1-5"]
Dataset = Literal["laion2b_en", "high_resolution", "aesthetics"]

RECIPES: dict[Dataset, str] = {
    "laion2b_en": "laion2b-en",
    "high_resolution": "laion-high-resolution",
    "aesthetics": "laion-aesthetics",
}


@dataclass(frozen=True)
class Phase:
    """One run of the chain: its data, and the run it starts from."""

    name: RunName
    dataset: Dataset
    after: RunName | None

    @property
    def recipe(self) -> str:
        """The recipe of its dataset."""
        return RECIPES[self.dataset]


# Stable_Diffusion_v1_Model_Card.md in CompVis/stable-diffusion, "Training Procedure"; -5 in runwayml's copy of it.
PHASES: tuple[Phase, ...] = (
    Phase("sd-v1-1-256", "laion2b_en", None),
    Phase("sd-v1-1-512", "high_resolution", "sd-v1-1-256"),
    Phase("sd-v1-2", "aesthetics", "sd-v1-1-512"),
    Phase("sd-v1-3", "aesthetics", "sd-v1-2"),
    Phase("sd-v1-4", "aesthetics", "sd-v1-2"),
    Phase("sd-v1-5", "aesthetics", "sd-v1-2"),
)
CHAINS: dict[str, RunName] = {
    "v1-1": "sd-v1-1-512",
    **{phase.name.removeprefix("sd-"): phase.name for phase in PHASES[2:]},
}
"""The last run of each published model."""


def chain(until: RunName) -> list[Phase]:
    """The run and its ancestors, in order of training."""
    by_name = {phase.name: phase for phase in PHASES}
    phases: list[Phase] = []
    name: RunName | None = until
    while name is not None:
        phases.append(by_name[name])
        name = by_name[name].after
    return phases[::-1]


def find_chain(name: str) -> list[Phase]:
    """The runs of a published model, e.g. "v1-4", in order of training; UserError if there is no such model."""
    if name not in CHAINS:
        raise UserError(f"There is no chain '{name}'.{nearest(name, list(CHAINS))}")
    return chain(CHAINS[name])


def configs_of(phases: Sequence[Phase]) -> list[TrainConfig]:
    """The configs of runs."""
    return [load_config(phase.name) for phase in phases]
