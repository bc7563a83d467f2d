"""Measured energy: the hardware's counters, and the log that keeps what each session of a run used."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from sdtrain.errors import UserError

POWERCAP = Path("/sys/class/powercap")
_KINDS = {"str": str, "int": int, "float": float}


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


class EnergyLog:
    """energy.csv, written by one process: the energy of each session (start of the training command) of a run.

    Unlike the other logs it is never truncated: steps repeated after a kill cost energy twice, so both count. A killed
    session's energy after its last line is lost.
    """

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


class Counter(Protocol):
    """Counts energy from its creation on."""

    def joules(self) -> float | None:
        """Energy since creation; None if it can no longer be read."""


class GpuCounter:
    """The energy of one whole GPU (NVML, Volta and later; mJ since the driver was loaded); pynvml must be initialised.

    NVMLError if there is no such counter, as for parts of a GPU (MIG).
    """

    def __init__(self, nvml: Any, uuid: str):
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._first: int = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules(self) -> float | None:
        """Energy since creation; None if the driver was reloaded or is gone."""
        try:
            used: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._first
        except self._nvml.NVMLError:
            return None
        return used / 1000 if used >= 0 else None


class RaplCounter:
    """The energy of one whole package or its memory, from its powercap folder `zone` (in uJ).

    It must be read before it wraps around, which for some packages is after five minutes at full load. OSError if it is
    unreadable, as since Linux 5.10 by default for all but root.
    """

    def __init__(self, zone: Path):
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last, self._sum = self._read(), 0

    def joules(self) -> float | None:
        """Energy since creation; None if it can no longer be read."""
        try:
            now = self._read()
        except (OSError, ValueError):
            return None
        self._sum += (now - self._last) % (self._range + 1)
        self._last = now
        return self._sum / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def gpu_counters(uuids: Sequence[str]) -> list[Counter] | None:
    """The counters of these GPUs; None unless all have one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [GpuCounter(pynvml, uuid) for uuid in uuids]
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None


def cpu_counters(powercap: Path = POWERCAP) -> list[Counter] | None:
    """The counters of this machine's packages and separate memory; None unless all can be read."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _counts(zone)]
    try:
        return [RaplCounter(zone) for zone in zones] or None
    except (OSError, ValueError):
        return None


def _counts(zone: Path) -> bool:
    """Whether a zone is a package or memory: cores are part of a package, and `psys` repeats everything."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"
