"""The hardware's energy counters: NVML for GPUs, RAPL for CPUs and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """Something that counts energy up from its own beginning."""

    def joules(self) -> float | None:
        """Energy since the counter was made; None if it can no longer be read."""


class GpuCounter:
    """The energy of one GPU, whoever uses it (NVML; Volta and later; counted in mJ since its driver was loaded).

    Args:
        nvml: the module pynvml, initialised.
        uuid: which GPU, as "GPU-...".

    Raises:
        nvml.NVMLError: this GPU has no such counter, as parts of a GPU (MIG) have none.
    """

    def __init__(self, nvml: Any, uuid: str):
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._first: int = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules(self) -> float | None:
        """Energy since the counter was made; None if the driver was reloaded or is gone."""
        try:
            used: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._first
        except self._nvml.NVMLError:
            return None
        return used / 1000 if used >= 0 else None


class RaplCounter:
    """The energy of one package, or its memory, whoever uses it (Linux' powercap; counted in uJ, which wraps around).

    It must be read more often than it wraps around: of some packages that is after five minutes at full load.

    Args:
        zone: its folder, with `energy_uj` and `max_energy_range_uj`.

    Raises:
        OSError: it cannot be read; since Linux 5.10 by default only root may.
    """

    def __init__(self, zone: Path):
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last, self._sum = self._read(), 0

    def joules(self) -> float | None:
        """Energy since the counter was made; None if it can no longer be read."""
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
    """The counters of these GPUs; None unless every one of them has one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [GpuCounter(pynvml, uuid) for uuid in uuids]
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None


def cpu_counters(powercap: Path = POWERCAP) -> list[Counter] | None:
    """The counters of this machine's packages and, where they are apart, of their memory; None unless all can be read.

    Args:
        powercap: Linux' folder of them.
    """
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _counts(zone)]
    try:
        return [RaplCounter(zone) for zone in zones] or None
    except (OSError, ValueError):
        return None


def _counts(zone: Path) -> bool:
    """Whether a zone is a package or a memory: cores are part of a package, and `psys` is all of it once more."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"
