"""The order in which streams wait for one another; there is no GPU here to run them."""

from contextlib import contextmanager

import pytest
import torch

from sdtrain.models.copies import Copies


class Stream:
    def __init__(self, name, log):
        self.name, self._log = name, log

    def wait_stream(self, other):
        self._log.append(f"{self.name} waits for {other.name}")


class Gpu:
    """PyTorch's CUDA as far as copies use it: it notes what is done on which stream, and copies at once."""

    def __init__(self, monkeypatch):
        self.log, names = [], iter(("in", "out"))
        self.kernels = self.now = Stream("kernels", self.log)
        gpu = self

        class Event:
            def record(self, stream):
                gpu.log.append(f"event after {stream.name}")

            def synchronize(self):
                gpu.log.append("host waits for the event")

        def to(tensor, device, non_blocking=False):
            assert non_blocking
            gpu.log.append(f"copy to {device} on {gpu.now.name}")
            return tensor.clone()

        def copy_(target, source, non_blocking=False):
            assert non_blocking
            gpu.log.append(f"copy to host on {gpu.now.name}")
            return target.set_(source.clone())

        def empty(shape, dtype, pin_memory):
            gpu.log.append("pinned memory") if pin_memory else pytest.fail("pageable memory")
            return torch.zeros(shape, dtype=dtype)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names), self.log))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.kernels)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (self.log.append("pinned"), tensor)[1])
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, s: self.log.append(f"kept for {s.name}"))

    @contextmanager
    def _on(self, stream):
        self.now = stream
        yield
        self.now = self.kernels


def test_kernels_wait_for_what_comes_in_and_what_goes_out_waits_for_kernels_but_the_host_for_neither(monkeypatch):
    gpu = Gpu(monkeypatch)
    copies = Copies(torch.device("cuda", 1))
    values = torch.arange(4)
    there = copies.to_device(values)
    assert gpu.log == ["pinned", "copy to cuda:1 on in", "kernels waits for in", "kept for kernels"]
    gpu.log.clear()
    back = copies.to_host(there)
    assert gpu.log == [
        "out waits for kernels",
        "pinned memory",
        "copy to host on out",
        "kept for out",
        "event after out",
    ]
    gpu.log.clear()
    assert torch.equal(back.wait(), values)
    assert gpu.log == ["host waits for the event"]


def test_on_a_cpu_nothing_is_copied():
    copies, values = Copies(torch.device("cpu")), torch.arange(4)
    assert copies.to_device(values) is values
    assert copies.to_host(values).wait() is values
