"""The model card's chains of runs, and the datasets that they are trained on."""

from __future__ import annotations

from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.settings import nearest

RECIPE_OF = {
    "sd-v1-1-256": "laion2b-en",
    "sd-v1-1-512": "laion-high-resolution",
    "sd-v1-2": "laion-aesthetics",
    "sd-v1-3": "laion-aesthetics",
    "sd-v1-4": "laion-aesthetics",
    "sd-v1-5": "laion-aesthetics",
}
_BASE = ("sd-v1-1-256", "sd-v1-1-512")
CHAINS = {
    "v1-1": _BASE,
    "v1-2": (*_BASE, "sd-v1-2"),
    **{f"v1-{n}": (*_BASE, "sd-v1-2", f"sd-v1-{n}") for n in (3, 4, 5)},
}


def chain_of(name: str) -> list[TrainConfig]:
    """The runs of a chain, in order.

    Raises:
        UserError: there is no such chain.
    """
    if name not in CHAINS:
        raise UserError(f"There is no chain '{name}'.{nearest(name, list(CHAINS))}")
    return [load_config(run) for run in CHAINS[name]]


def recipes_of(runs: list[TrainConfig]) -> list[str]:
    """The recipes of the datasets that some runs need, each once."""
    return list(dict.fromkeys(RECIPE_OF[run.name] for run in runs))
