"""Numerical precision of networks: set by the user, or chosen by speed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Fixed = Literal["bf16", "fp16", "fp32"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]

_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FASTER = 1.1  # least gain that justifies bf16's rounding, and above measurement noise
_HOPELESS = 0.25  # of fp32's speed; without bf16 units a large product would take most of a second
_SMALL, _LARGE, _NUM_ROUNDS = 64, 256, 6  # widths


@dataclass(frozen=True)
class Speedup:
    """Speed of a device in bf16 over that in fp32, forward and backward."""

    product: float
    convolution: float

    @property
    def pays(self) -> bool:
        """Whether a network of products and convolutions is faster in bf16."""
        return min(self.product, self.convolution) >= 1 and (self.product * self.convolution) ** 0.5 >= _FASTER

    def __str__(self) -> str:
        return f"in bf16 products run at {self.product:.2g} and convolutions at {self.convolution:.2g} times the speed"


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it."""

    precision: Fixed
    reason: str


def choose(device: torch.device | str, measure: Callable[[], Speedup] | None = None) -> Choice:
    """Chooses bf16 where the device computes faster in it, else fp32.

    GPUs report bf16 units. CPUs are measured for a fraction of a second (by `measure`, if given), because names and
    flags do not tell whether the installed libraries use what a CPU has.
    """
    import torch

    if torch.device(device).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "the GPU has bf16 units")
        return Choice("fp32", "the GPU has no bf16 units")
    speedup = (measure or cpu_speedup)()
    return Choice("bf16" if speedup.pays else "fp32", f"on this CPU {speedup}")


def resolve(precision: Precision, device: torch.device | str | None = None) -> Fixed:
    """Replaces `auto` by the choice for `device` (default: the GPU, if any)."""
    return choose(device or default_device()).precision if precision == "auto" else precision


def warning_if_slow(precision: Fixed, device: torch.device | str, measure: Callable[[], Speedup] | None = None) -> str:
    """Returns a warning if `device` computes much more slowly in `precision` than in fp32, else ""."""
    if precision == "fp32":
        return ""
    choice = choose(device, measure)
    if choice.precision == "bf16":
        return ""
    return f"precision {precision} is slow here: {choice.reason}. Set precision to fp32 if that matters."


@lru_cache(maxsize=1)
def cpu_speedup() -> Speedup:
    """Measures this CPU, once per process."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads waiting for one another would dominate
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            return Speedup(product=_ratio(_product), convolution=_ratio(_convolution))
    finally:
        torch.set_num_threads(num_threads)


def _ratio(make: Callable[[torch.dtype, int], Callable[[], None]]) -> float:
    """Best time in fp32 over best time in bf16, in alternate rounds so that other load affects both."""
    import torch

    ratio = 1.0
    for side, num_rounds in ((_SMALL, 2), (_LARGE, _NUM_ROUNDS)):
        single, half = make(torch.float32, side), make(torch.bfloat16, side)
        single(), half()  # the first call builds the kernels
        rounds = [(_seconds(single), _seconds(half)) for _ in range(num_rounds)]
        best_single, best_half = (min(times) for times in zip(*rounds, strict=True))
        ratio = best_single / best_half
        if ratio < _HOPELESS:
            break
    return ratio


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)


def _product(dtype: torch.dtype, side: int) -> Callable[[], None]:
    import torch

    inputs, weight = (torch.randn(side, side, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda: (inputs @ weight).sum().backward()


def _convolution(dtype: torch.dtype, side: int) -> Callable[[], None]:
    import torch

    channels = side // 4
    inputs = torch.randn(4, channels, 16, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype, requires_grad=True)
    return lambda: torch.nn.functional.conv2d(inputs, weight, padding=1).sum().backward()


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of a precision; also accepts PyTorch's own names."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES.get(name, name))
    return dtype


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of `precision: auto` on `device` (default: the GPU, if any)."""
    return torch_dtype(resolve("auto", device))


def decoder_dtype(dtype: torch.dtype, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype in which the VAE decodes samples: bf16 after a UNet in bf16 on a GPU, else fp32.

    On a GPU fp32 takes a tenth of an image's time (by reckoning); fp16, in which some VAEs overflow, is left out.
    `device` defaults to the GPU, if any.
    """
    import torch

    on_gpu = torch.device(device or default_device()).type != "cpu"
    return torch.bfloat16 if on_gpu and dtype is torch.bfloat16 else torch.float32


def default_device() -> str:
    """The GPU, if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
