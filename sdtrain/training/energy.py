"""Measures the energy of a training run on all of its ranks."""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from sdtrain.impact.energy import Counter, EnergyLog, Spent, cpu_counters, gpu_counters
from sdtrain.training.distributed import Ranks

_POLL_S = 20.0


class Meter:
    """Sums energy counters (None if there are none) in a thread that polls before any wraps around."""

    def __init__(self, counters: Sequence[Counter] | None, poll_s: float = _POLL_S):
        self._counters, self._lock, self._closed = counters, threading.Lock(), threading.Event()
        self._poll_s = poll_s
        if counters:
            threading.Thread(target=self._poll, name="energy", daemon=True).start()

    def joules(self) -> float | None:
        """Energy so far; None if a counter cannot be read."""
        with self._lock:
            if self._counters is None:
                return None
            read = [counter.joules() for counter in self._counters]
            known = [joules for joules in read if joules is not None]
            if len(known) < len(read):
                self._counters = None  # what it missed is lost
                return None
            return sum(known)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(self._poll_s):
            self.joules()


class EnergyRecorder:
    """Writes a run's energy.csv on the first rank; all ranks call every method. Closes as a context manager.

    Each rank reads its own GPU's counter, the first of each machine also those of CPUs and memory, which include all
    other load on the hardware.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        open_cpu: Callable[[], Sequence[Counter] | None] = cpu_counters,
        open_gpus: Callable[[Sequence[str]], Sequence[Counter] | None] = gpu_counters,
    ):
        self._log, self._ranks, self._session = EnergyLog(run / "energy.csv"), ranks, uuid.uuid4().hex[:12]
        self._on_gpu = ranks.device.type == "cuda"
        self._device = _name(ranks.device)
        self._leads_host = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self._gpu = Meter(open_gpus([_uuid(ranks.device)]) if self._on_gpu else None)
        self._cpu = Meter(open_cpu() if self._leads_host else None)
        self._started, self._core_s = time.monotonic(), _core_seconds()

    def add(self, step: int) -> None:
        """Writes the energy spent until `step`."""
        hours = (time.monotonic() - self._started) / 3600
        gpu, cpu = self._gpu.joules(), self._cpu.joules()
        host_hours = hours * self._leads_host
        mine = [
            *(self._leads_host, hours, hours if gpu is not None else 0.0, gpu or 0.0),
            *(host_hours, host_hours if cpu is not None else 0.0, cpu or 0.0, _core_seconds() - self._core_s),
        ]
        hosts, device_h, measured_h, gpu_j, host_h, measured_host_h, cpu_j, core_s = self._ranks.sum(
            torch.tensor(mine, dtype=torch.float64)
        ).tolist()
        if self._ranks.is_first:
            known = (device_h, measured_h, gpu_j / 3.6e6, host_h, measured_host_h, cpu_j / 3.6e6, core_s / 3600)
            named = (self._session, step, self._device, self._ranks.world_size, round(hosts), int(self._on_gpu))
            self._log.add(Spent(*named, *known))

    def __enter__(self) -> EnergyRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the polling threads."""
        self._gpu.close()
        self._cpu.close()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() or platform.machine()


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _core_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
