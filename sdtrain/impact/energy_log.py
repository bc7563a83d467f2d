"""The energy of each session (start of the training command) of a run, in energy.csv.

Unlike the other logs it is never truncated: steps repeated after a kill cost energy twice, so both count. A killed
session's energy after its last line is lost.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sdtrain.errors import UserError


@dataclass(frozen=True)
class Spent:
    """The energy and hours of a session up to a step.

    Attributes:
        device: the ranks' device, as its driver names it.
        num_devices: ranks; each has one GPU, or a share of the cores.
        on_gpu: 1 or 0.
        device_hours: hours times devices, of which `measured_hours` had a GPU counter; `gpu_kwh` is its reading.
        host_hours: hours times machines, of which `measured_host_hours` had CPU and memory counters (`cpu_kwh`).
        core_hours: busy core time of the ranks' processes.
    """

    session: str
    step: int
    device: str
    num_devices: int
    num_hosts: int
    on_gpu: int
    device_hours: float
    measured_hours: float
    gpu_kwh: float
    host_hours: float
    measured_host_hours: float
    cpu_kwh: float
    core_hours: float


_KINDS = {"str": str, "int": int, "float": float}


class EnergyLog:
    """The file, written by one process."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, spent: Spent) -> None:
        """Appends a line."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Spent)])
            if is_new:
                writer.writeheader()
            writer.writerow({name: _short(value) for name, value in asdict(spent).items()})

    def sessions(self) -> list[Spent]:
        """Each session's last line, in order of start, skipping truncated lines; UserError if it is no energy log."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if set(reader.fieldnames or ()) != set(_types()):
                raise UserError(f"{self.path} is not a log of energy that this version can read; move it away.")
            last = {spent.session: spent for row in reader if (spent := _parse(row)) is not None}
        return list(last.values())


def _types() -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(Spent)}


def _parse(row: dict[str, str]) -> Spent | None:
    try:
        return Spent(**{name: _KINDS[kind](row[name]) for name, kind in _types().items()})
    except (TypeError, ValueError):
        return None


def _short(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
