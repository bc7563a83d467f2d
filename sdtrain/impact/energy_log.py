"""energy.csv of a run: the energy of each session. Unlike the other logs it is never truncated.

A session is one start of the training command. Steps that a killed session had done after its last checkpoint are done
again by the next one; their energy was spent all the same, so both count. What a killed session spent after its last
line is lost.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sdtrain.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What a session has spent until a step.

    Attributes:
        session: names the session.
        step: optimizer steps done.
        device: what the ranks ran on, as its driver names it.
        num_devices: ranks; each has one GPU, or a share of the cores.
        num_hosts: machines.
        on_gpu: 1 where the devices are GPUs, else 0.
        device_hours: hours times devices.
        measured_hours: those of them for which the GPU's own counter was read.
        gpu_kwh: what these counters say.
        host_hours: hours times machines.
        measured_host_hours: those of them for which the machine's counters of CPU and memory were read.
        cpu_kwh: what these counters say.
        core_hours: time that the ranks' processes kept cores busy.
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
    """The file. One process writes."""

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
        """The last line of each session, in the order of their beginnings; lines cut short by a crash are skipped.

        Raises:
            UserError: the file is no such log.
        """
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
