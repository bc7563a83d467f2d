"""The YAML at the head of a model card, which the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from sdtrain.config import TrainConfig
from sdtrain.model_card.dataset import DatasetFacts

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image"]

_PROMPT = (
    "The weights are open to everybody under the licence named above, which has conditions. In short: do not use the "
    "model to make or spread what is illegal or does harm; what you make is yours, and so is the responsibility for "
    "it; whoever gets the weights or a service from you has to get the same conditions, with a copy of the licence. "
    "Read the licence in full before you agree."
)


def front_matter(
    config: TrainConfig, datasets: Sequence[DatasetFacts], total_kg: float | None, hardware: str | None
) -> str:
    """The block, with its dashes.

    Args:
        config: the run.
        datasets: that it was trained on.
        total_kg: CO2 equivalents of training and data; None if not known.
        hardware: what it was trained on.
    """
    content: dict[str, Any] = {
        "license": config.card.license,
        "language": ["en"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": TAGS,
        "inference": True,
    }
    if ids := sorted({facts.hub_id for facts in datasets if facts.hub_id}):
        content["datasets"] = ids
    if total_kg is not None:
        content["co2_eq_emissions"] = {
            "emissions": round(1000 * total_kg, 3),  # the Hub counts in grams
            "source": "energy of training, measured or estimated, and of data preparation: see the card",
            "training_type": "pre-training" if config.init_from is None else "fine-tuning",
            "geographical_location": config.card.region or "own figure of the grid",
            "hardware_used": hardware or "not recorded",
        }
    if config.card.gated:
        content |= {
            "extra_gated_heading": "Please read the licence and agree to it",
            "extra_gated_prompt": _PROMPT,
            "extra_gated_fields": {"I have read the licence and agree to its conditions": "checkbox"},
        }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)}---"
