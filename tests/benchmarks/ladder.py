"""Optimizations of training, one after the other, each kept if it makes training faster.

The first rung cannot run out of memory: small micro-batches, recomputed activations, fused attention. Each rung has its
own `try`, and an optimizer step has the same images on all of them, so that larger micro-batches do not gain from
fewer optimizer steps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.benchmarks.training_loops import CUDA


@dataclass(frozen=True)
class Rung:
    """Changes to what was best so far.

    Attributes:
        speed: of `SpeedConfig`.
        micro_batch: times the first rung's.
        checkpointing: whether activations are recomputed; None: as before.
        needs_gpu: makes no sense, or is not there, on a CPU.
        least_s: not begun with less time than this, because it compiles.
    """

    speed: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    checkpointing: bool | None = None
    needs_gpu: bool = False
    least_s: float = 0.0

    @property
    def name(self) -> str:
        """The changes in words."""
        changes = dict(self.speed)
        changes |= {"micro_batch": f"x{self.micro_batch}"} if self.micro_batch else {}
        changes |= {} if self.checkpointing is None else {"gradient_checkpointing": self.checkpointing}
        return " ".join(f"{key}={value}" for key, value in changes.items())

    def after(self, before: Rung) -> Rung:
        """All settings, with those of `before` where this rung has none."""
        return Rung(
            before.speed | self.speed,
            self.micro_batch or before.micro_batch,
            before.checkpointing if self.checkpointing is None else self.checkpointing,
        )

    def content(self, content: dict[str, Any], images_per_step: int) -> dict[str, Any]:
        """A config's settings with these, for optimizer steps of `images_per_step` images on one GPU."""
        first = content["micro_batch_size"]
        return content | {
            "global_batch_size": images_per_step,
            "micro_batch_size": first * (self.micro_batch or 1),
            "unet": content["unet"] | {"gradient_checkpointing": bool(self.checkpointing)},
            "speed": content["speed"] | self.speed,
        }


FIRST = Rung(
    {"attention": "sdpa", "channels_last": False, "cudnn_benchmark": False, "fused_adamw": False, "tf32": False},
    micro_batch=1,
    checkpointing=True,
)
LARGEST_MICRO_BATCH = 8
"""Of the rungs, times the first one's: images of an optimizer step are a multiple of it."""
RUNGS = (
    Rung({"fused_adamw": True, "cudnn_benchmark": True, "tf32": True}),
    Rung({"channels_last": True}),
    Rung(micro_batch=4),
    Rung(checkpointing=False),
    Rung({"attention": "cudnn"}, needs_gpu=True),
    Rung({"attention": "flash"}, needs_gpu=True),
    Rung({"compile": "fused"}, needs_gpu=True, least_s=30),
    Rung(micro_batch=8, least_s=15),
    Rung({"compile": "regional"}, needs_gpu=True, least_s=60),
    Rung({"compile": "whole"}, needs_gpu=True, least_s=90),
    Rung({"compile": "whole", "compile_mode": "reduce-overhead"}, needs_gpu=True, least_s=90),
    Rung({"compile": "whole", "compile_mode": "max-autotune-no-cudagraphs"}, needs_gpu=True, least_s=300),
)
"""What may pay most comes first, what compiles for minutes last. fp32_gradients is none of them: it changes results."""


@dataclass
class Climb:
    """A ladder, as far as it was climbed.

    Attributes:
        best: the settings of the fastest rung.
        images_per_s: its rate.
        first: the rate of the first rung.
        rungs: by name, rate and memory, or why there is none.
    """

    best: Rung
    images_per_s: float = 0.0
    first: float = 0.0
    rungs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """What is worth keeping."""
        return {
            "images_per_s": round(self.images_per_s, 2),
            "vs_first": round(self.images_per_s / self.first, 2) if self.first else None,
            "rungs": self.rungs,
            "best": {
                "speed": self.best.speed,
                "micro_batch": self.best.micro_batch,
                "gradient_checkpointing": self.best.checkpointing,
            },
        }


def climb(
    measure: Callable[[Rung], dict[str, float]],
    seconds_left: Callable[[], float] = lambda: float("inf"),
    on_rung: Callable[[Climb], None] = lambda climb: None,
    rungs: Iterable[Rung] = RUNGS,
) -> Climb:
    """Measures rung after rung, each on top of the best before.

    Args:
        measure: gives `images_per_s`, and anything else worth recording, for complete settings.
        seconds_left: a rung that takes as long as the one before does not begin with less.
        on_rung: told after every rung.
        rungs: after the first.
    """
    climbed, longest_s = Climb(FIRST), 0.0
    for rung in (FIRST, *rungs):
        if rung.needs_gpu and not CUDA:
            continue
        left = seconds_left()
        if left < max(rung.least_s, 1.2 * longest_s):
            climbed.rungs[rung.name] = {"skipped": f"{left:.0f} s were left"}
            continue
        started = time.monotonic()
        _try(rung, climbed, measure)
        longest_s = max(longest_s, time.monotonic() - started) if not rung.least_s else longest_s
        on_rung(climbed)
    return climbed


def _try(rung: Rung, climbed: Climb, measure: Callable[[Rung], dict[str, float]]) -> None:
    settings = rung.after(climbed.best)
    try:
        measured = measure(settings)
    except Exception as error:
        climbed.rungs[rung.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{rung.name}: {climbed.rungs[rung.name]['error']}", flush=True)
    else:
        rate = measured["images_per_s"]
        gain = round(rate / climbed.images_per_s, 3) if climbed.images_per_s else None
        climbed.rungs[rung.name] = {**measured, "images_per_s": round(rate, 2), "vs_best_before": gain}
        climbed.first = climbed.first or rate
        print(f"{rung.name}: {rate:.2f} images/s, {gain or 1} of the best before", flush=True)
        if rate > climbed.images_per_s:
            climbed.best, climbed.images_per_s = settings, rate
    free_memory()


def free_memory() -> None:
    """Gives the device's memory back, which a failed rung's traceback held until now."""
    gc.collect()
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
