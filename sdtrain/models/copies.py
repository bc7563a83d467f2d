"""Copies between host memory and a GPU that overlap its work; plain ones on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class PendingCopy:
    """A tensor on its way to host memory; `ready` is the event of its arrival, None if it is there."""

    tensor: torch.Tensor
    ready: Any = None

    def wait(self) -> torch.Tensor:
        """The tensor, once it has arrived."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tensor


class Copies:
    """Copies through pinned memory, in each direction on a stream of its own.

    The current stream, where kernels run, waits for what was copied in; what is copied out waits for it. The host waits
    for neither. Memory given back early is not reused while another stream needs it (`record_stream`).
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._into: torch.cuda.Stream | None = None
        self._out: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._into, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Copies a tensor from host memory; on a CPU it is returned itself."""
        if self._into is None:
            return host
        pinned = host.pin_memory()
        with torch.cuda.stream(self._into):
            copied = pinned.to(self._device, non_blocking=True)
        kernels = torch.cuda.current_stream(self._device)
        kernels.wait_stream(self._into)
        copied.record_stream(kernels)
        return copied

    def to_host(self, tensor: torch.Tensor) -> PendingCopy:
        """Begins to copy what kernels queued so far leave in `tensor`; on a CPU it is returned itself."""
        if self._out is None:
            return PendingCopy(tensor)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            tensor.record_stream(self._out)
            ready = torch.cuda.Event()
            ready.record(self._out)
        return PendingCopy(copied, ready)


@lru_cache(maxsize=8)
def copies_of(device: torch.device) -> Copies:
    """This process's streams of a device."""
    return Copies(device)
