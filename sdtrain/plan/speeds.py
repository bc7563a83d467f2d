"""Interpolates published training speeds by GPU, number of GPUs and micro-batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from sdtrain.errors import UserError
from sdtrain.plan.measured import read_measured
from sdtrain.settings import Settings, nearest

_FILE = Path(__file__).parent / "speeds.yaml"
TFLOP_PER_IMAGE = {256: 0.540, 512: 2.410}
"""Forward and backward pass of SD v1's UNet, by resolution in px (three times the forward pass)."""


class Speed(Settings):
    """One published speed."""

    resolution: int
    num_gpus: int = Field(ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    """None if the source does not say."""
    images_per_s: float = Field(gt=0)
    """Of one GPU."""
    source: str

    def __str__(self) -> str:
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"{self.images_per_s:g} at {_gpus(self.num_gpus)}{micro_batch} ({self.source})"


@lru_cache(maxsize=1)
def published_speeds() -> dict[str, tuple[Speed, ...]]:
    """The published speeds by GPU."""
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text())
    return {gpu: tuple(Speed.model_validate(speed) for speed in speeds) for gpu, speeds in content.items()}


def require_gpu(gpu: str) -> None:
    """Refuses a GPU without speeds; UserError names the nearest that has some."""
    known = list(dict.fromkeys([*published_speeds(), *(speed.gpu for speed in read_measured().training)]))
    if gpu not in known:
        raise UserError(f"No training rate is known for the GPU '{gpu}'.{nearest(gpu, known)}")


@dataclass(frozen=True)
class Load:
    """A run's load on each GPU; `micro_batch` is the number of images in one forward pass."""

    gpu: str
    num_gpus: int
    micro_batch: int
    resolution: int


@dataclass(frozen=True)
class SpeedEstimate:
    """The speed of one GPU with its `source`, as in "published: ...", and all figures used.

    `remarks` are assumptions beyond the figures.
    """

    images_per_s: float
    source: str
    remarks: tuple[str, ...] = ()


def estimate_speed(load: Load) -> SpeedEstimate:
    """The training speed of a GPU: our own measurement if there is one, else from published ones.

    Between two micro-batches the seconds of a micro-step grow linearly: a fixed part for the host, and one per image.
    Between two numbers of GPUs the speed is linear in the logarithm of the number. Beyond the figures the nearest one
    is used, with a remark. A resolution without figures is converted by FLOP: micro-steps of equal FLOP take equally
    long. UserError if nothing is known about this GPU at this resolution.
    """
    require_gpu(load.gpu)
    ours, public = _measured_speeds(load.gpu), published_speeds().get(load.gpu, ())
    for speeds, resolution in itertools.product((ours, public), (load.resolution, 512)):
        at_resolution = [speed for speed in speeds if speed.resolution == resolution]
        if at_resolution and _converts(load.resolution, resolution):
            if speeds is ours:
                return _from_ours(at_resolution, public, load, resolution)
            return _Interpolation(at_resolution, load, resolution).estimate("published")
    raise UserError(f"No training rate is known at {load.resolution} px; there are some at 256 and 512.")


def _measured_speeds(gpu: str) -> tuple[Speed, ...]:
    measured = [speed for speed in read_measured().training if speed.gpu == gpu]
    return tuple(Speed(**speed.model_dump(exclude={"gpu", "commit"})) for speed in measured)


def _converts(resolution: int, other: int) -> bool:
    return resolution == other or {resolution, other} <= set(TFLOP_PER_IMAGE)


def _from_ours(ours: Sequence[Speed], public: Sequence[Speed], load: Load, resolution: int) -> SpeedEstimate:
    """Our speed on few GPUs, times the share that published speeds lose from there to `load.num_gpus`."""
    num_measured = max(speed.num_gpus for speed in ours)
    few = replace(load, num_gpus=min(load.num_gpus, num_measured))
    measured = _Interpolation(ours, few, resolution).estimate("measured")
    if load.num_gpus <= num_measured:
        return measured
    remarks = [*measured.remarks]
    share = 1.0
    if at_resolution := [speed for speed in public if speed.resolution == resolution]:
        many = _Interpolation(at_resolution, load, resolution).estimate("published")
        share = many.images_per_s / _Interpolation(at_resolution, few, resolution).estimate("published").images_per_s
        remarks += [
            f"measured on {_gpus(num_measured)}; times {share:.3f}, which published speeds lose up to {load.num_gpus}",
            *(remark for remark in many.remarks if "GPUs" in remark),
        ]
    else:
        remarks.append(f"measured on {_gpus(num_measured)}; what {load.num_gpus} lose in communication is not in it")
    return SpeedEstimate(measured.images_per_s * share, measured.source, tuple(remarks))


@dataclass
class _Interpolation:
    """Interpolates the speeds of one GPU at one resolution for a load.

    `used` are the figures that count; `remarks` describe what goes beyond them.
    """

    speeds: Sequence[Speed]
    load: Load
    resolution: int
    used: list[Speed] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def estimate(self, kind: str) -> SpeedEstimate:
        """The estimate from figures of one kind."""
        wanted = self.load.micro_batch * self._flop_ratio()
        seconds = self._seconds(wanted)
        if self.resolution != self.load.resolution:
            self.remarks.append(
                f"no figures at {self.load.resolution} px: a micro-batch of {self.load.micro_batch} there is taken to "
                f"last as long as one of {wanted:.3g} at {self.resolution} px, which has as many FLOP"
            )
        figures = "; ".join(str(speed) for speed in dict.fromkeys(self.used))
        rate = self.load.micro_batch / seconds
        source = f"{kind}: {rate:.1f} images/s a GPU at micro-batch {self.load.micro_batch}, from {figures}"
        return SpeedEstimate(rate, source, tuple(self.remarks))

    def _flop_ratio(self) -> float:
        if self.resolution == self.load.resolution:
            return 1.0
        return TFLOP_PER_IMAGE[self.load.resolution] / TFLOP_PER_IMAGE[self.resolution]

    def _seconds(self, micro_batch: float) -> float:
        """Seconds of a micro-step of that many images at `self.resolution`."""
        by_size: dict[int, list[Speed]] = {}
        for speed in self.speeds:
            if speed.micro_batch is not None:
                by_size.setdefault(speed.micro_batch, []).append(speed)
        if not by_size:
            return micro_batch / self._rate(self.speeds)
        sizes = sorted(by_size)
        below = max((size for size in sizes if size <= micro_batch), default=None)
        above = min((size for size in sizes if size >= micro_batch), default=None)
        if below is None:
            self.remarks.append(
                f"no figure below micro-batch {sizes[0]}: the micro-step is taken to last as long as that one's, for "
                "which the host is the limit"
            )
            return sizes[0] / self._rate(by_size[sizes[0]])
        if above is None:
            if self.resolution == self.load.resolution:
                self.remarks.append(f"no figure above micro-batch {sizes[-1]}, whose speed is taken")
            return micro_batch / self._rate(by_size[sizes[-1]])
        return _between(micro_batch, {size: size / self._rate(by_size[size]) for size in (below, above)})

    def _rate(self, speeds: Sequence[Speed]) -> float:
        """Images a second of one GPU among `load.num_gpus`, from speeds of one micro-batch."""
        by_number = {speed.num_gpus: speed for speed in speeds}
        numbers, wanted = sorted(by_number), self.load.num_gpus
        below = max((number for number in numbers if number <= wanted), default=numbers[0])
        above = min((number for number in numbers if number >= wanted), default=numbers[-1])
        self.used += [by_number[number] for number in dict.fromkeys((below, above))]
        if not numbers[0] <= wanted <= numbers[-1]:
            self.remarks.append(_beyond(speeds[0].micro_batch, numbers, wanted))
        points = {math.log2(number): by_number[number].images_per_s for number in dict.fromkeys((below, above))}
        return _between(math.log2(wanted), points)


def _beyond(micro_batch: int | None, numbers: Sequence[int], wanted: int) -> str:
    with_size = f" with micro-batch {micro_batch}" if micro_batch else ""
    if wanted < numbers[0]:
        return f"no figure below {_gpus(numbers[0])}{with_size}, whose speed is taken"
    return (
        f"no figure beyond {_gpus(numbers[-1])}{with_size}, whose speed is taken: {wanted} communicate more, so this "
        "is an upper bound"
    )


def _between(wanted: float, points: Mapping[float, float]) -> float:
    """Interpolates linearly between two points, or returns the value of one."""
    (x0, y0), (x1, y1) = min(points.items()), max(points.items())
    return y0 if x0 == x1 else y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number > 1 else ''}"
