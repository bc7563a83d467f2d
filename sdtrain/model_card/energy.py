"""The card's hours, energy and CO2, measured or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.config.card import CardConfig
from sdtrain.impact.carbon import emissions_kg
from sdtrain.impact.energy import Spent
from sdtrain.impact.footprint import footprint
from sdtrain.model_card.records import DatasetFacts


@dataclass(frozen=True)
class EnergyRow:
    """One line of the table; `kwh`, and `kg` of CO2 equivalents, are None if unknown."""

    what: str
    hours: str
    kwh: float | None
    kg: float | None
    source: str


def amount(value: float | None) -> str:
    """Formats a number to four digits, or to the unit."""
    if value is None:
        return "not known"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def training_row(what: str, sessions: Sequence[Spent], config: CardConfig) -> EnergyRow:
    """The row of training sessions."""
    if not sessions:
        return EnergyRow(what, "not recorded", None, None, "not recorded")
    made = footprint(sessions, config.gpu_watts)
    counted = [f"{len(sessions)} session{'s' * (len(sessions) > 1)}"]
    if made.gpu_hours:
        counted.append(_source("GPUs", made.measured_gpu, _board(made.board_w)))
    counted.append(_source("CPUs", made.measured_cpu, "7 W for each busy core"))
    hours = f"{amount(made.gpu_hours)} GPU-hours" if made.gpu_hours else f"{amount(made.core_hours)} core-hours"
    return EnergyRow(what, hours, made.kwh, _kg(made.kwh, config), "; ".join(counted))


def preparation_row(facts: DatasetFacts, config: CardConfig) -> EnergyRow:
    """The row of a dataset's stages, estimated: manifests record seconds, not energy."""
    what = f"Data preparation: {facts.name or facts.root}"
    if not facts.stage_hours:
        return EnergyRow(what, "not recorded", None, None, "not recorded")
    kwh = facts.kwh(config.data_gpu, config.data_cores)
    gpu = f", {config.data_gpu} at its board power in {' and '.join(facts.gpu_stages)}" if config.data_gpu else ""
    source = f"estimated from the stages' seconds: {config.data_cores:g} cores of 7 W a worker{gpu}"
    return EnergyRow(what, f"{amount(sum(facts.stage_hours.values()))} worker-hours", kwh, _kg(kwh, config), source)


def _kg(kwh: float | None, config: CardConfig) -> float | None:
    intensity = config.intensity()
    return None if kwh is None or intensity is None else emissions_kg(kwh, intensity, config.pue)


def _source(name: str, measured: float, otherwise: str) -> str:
    if measured > 0.9995:
        return f"{name}: measured"
    rest = f"estimated with {otherwise}"
    return f"{name}: {rest}" if not measured else f"{name}: {measured:.1%} of the hours measured, the rest {rest}"


def _board(watts: float | None) -> str:
    return "a power that is not known: set card.gpu_watts" if watts is None else f"{watts:g} W a GPU"
