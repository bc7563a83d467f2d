"""The hardware's energy counters: NVML for GPUs, RAPL for CPUs and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


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
