"""Adds up the energy of training sessions, measured or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.impact.carbon import CORE_W, energy_kwh
from sdtrain.impact.energy import Spent
from sdtrain.impact.gpus import board_watts


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
