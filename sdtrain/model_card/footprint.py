"""From what was counted, and what was not, to energy and CO2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.impact.carbon import energy_kwh
from sdtrain.impact.devices import CORE_W, board_watts
from sdtrain.impact.energy_log import Spent


@dataclass(frozen=True)
class Footprint:
    """The energy of some sessions.

    Attributes:
        gpu_hours: hours of GPUs; 0 on CPUs.
        host_hours: hours of machines.
        core_hours: busy hours of cores, of the training processes.
        gpu_kwh, cpu_kwh: energy, measured or estimated; gpu_kwh is None where the GPUs' power is not known.
        measured_gpu, measured_cpu: share of the hours for which counters were read.
        board_w: power by which the other GPU hours were estimated; None if there are none or it is not known.
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
    """Adds up sessions; hours without a counter are taken at stated power.

    Args:
        sessions: of one run, or of a chain.
        gpu_watts: of each GPU; by default its data sheet's.
    """
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
