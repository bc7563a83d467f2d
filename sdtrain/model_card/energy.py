"""The card's hours, energy and CO2, measured or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.config.card import CardConfig
from sdtrain.impact.carbon import CORE_W, emissions_kg, energy_kwh
from sdtrain.impact.energy import Spent
from sdtrain.impact.gpus import board_watts
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


@dataclass(frozen=True)
class Footprint:
    """The energy of some sessions, measured or estimated.

    Attributes:
        core_hours: busy hours of cores, of the training processes.
        gpu_kwh: None if the GPUs' power is unknown.
        measured_gpu, measured_cpu: share of the hours with counters.
        board_w: assumed for the other GPU hours; None if there are none or it is unknown.
    """

    gpu_hours: float
    host_hours: float
    core_hours: float
    gpu_kwh: float | None
    cpu_kwh: float
    measured_gpu: float
    measured_cpu: float
    board_w: float | None

    @property
    def kwh(self) -> float | None:
        """All of it."""
        return None if self.gpu_kwh is None else self.gpu_kwh + self.cpu_kwh


def footprint(sessions: Sequence[Spent], gpu_watts: float | None = None) -> Footprint:
    """Adds up sessions; hours without a counter count at `gpu_watts` per GPU, by default its data sheet's."""
    on_gpu = [spent for spent in sessions if spent.on_gpu]
    gpu_hours = sum(spent.device_hours for spent in on_gpu)
    host_hours = sum(spent.host_hours for spent in sessions)
    gpu_kwh, watts = _gpu_kwh(on_gpu, gpu_watts)
    cpu_kwh = sum(_cpu_kwh(spent) for spent in sessions)
    return Footprint(
        gpu_hours=gpu_hours,
        host_hours=host_hours,
        core_hours=sum(spent.core_hours for spent in sessions),
        gpu_kwh=gpu_kwh,
        cpu_kwh=cpu_kwh,
        measured_gpu=sum(spent.measured_hours for spent in on_gpu) / gpu_hours if gpu_hours else 0.0,
        measured_cpu=sum(spent.measured_host_hours for spent in sessions) / host_hours if host_hours else 0.0,
        board_w=watts,
    )


def _gpu_kwh(sessions: Sequence[Spent], gpu_watts: float | None) -> tuple[float | None, float | None]:
    total, used = 0.0, None
    for spent in sessions:
        total += spent.gpu_kwh
        missing = spent.device_hours - spent.measured_hours
        if missing > 1e-9:
            used = gpu_watts or board_watts(spent.device)
            if used is None:
                return None, None
            total += energy_kwh(missing, used)
    return total, used


def _cpu_kwh(spent: Spent) -> float:
    unmeasured = 1 - spent.measured_host_hours / spent.host_hours if spent.host_hours else 1.0
    return spent.cpu_kwh + energy_kwh(spent.core_hours * unmeasured, CORE_W)
