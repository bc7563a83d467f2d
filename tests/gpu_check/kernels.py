"""Time on the device by class of kernel, and what each class loses against the device's best."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.config.sections import UNetConfig
from sdtrain.models.unet import LATENT_CHANNELS, build_unet
from sdtrain.training.throughput import TRAIN_FACTOR

CLASSES = (
    ("copy", r"nchwtonhwc|nhwctonchw|transpose|memcpy|memset|copy|catarray|cat_array|\baten::(cat|contiguous|clone)\b"),
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|cudnn"),
    ("optimizer", r"adam|multi_tensor|foreach|lerp"),
    ("communication", r"nccl|all_?reduce|reduce_scatter|all_?gather"),
    ("norm", r"norm|rowwisemoments"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|cublas|xmma|matmul|\baten::(b|add)?mm\b|\baten::baddbmm\b"),
    ("elementwise", r"elementwise|pointwise|triton|reduce|\baten::"),
)
"""Class, and how its kernels and operators are called; the first that matches has it. Convolutions of cuDNN are matrix
products too, and attention of cuDNN is by the same library, so the order matters."""
LARGEST = 20


def class_of(name: str) -> str:
    """A kernel's class by its name."""
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name.lower())), "other")


def summed(profiler: torch.profiler.profile, wall_s: float) -> dict[str, Any]:
    """Milliseconds by class of kernel on CUDA, by class of operator on a CPU; `idle` is the time of no kernel."""
    events = _events(profiler)
    by_class: dict[str, float] = defaultdict(float)
    for name, milliseconds, _ in events:
        by_class[class_of(name)] += milliseconds
    busy = sum(by_class.values())
    return {
        "wall_ms": round(1e3 * wall_s, 2),
        "by_class_ms": {name: round(spent, 2) for name, spent in sorted(by_class.items(), key=lambda item: -item[1])},
        "idle_ms": round(max(0.0, 1e3 * wall_s - busy), 2),
        "launches": sum(count for _, _, count in events),
        "largest": [[name[:120], round(spent, 3), count] for name, spent, count in events[:LARGEST]],
    }


def _events(profiler: torch.profiler.profile) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of calls, the longest first."""
    averages: Any = profiler.key_averages()
    on_device = [event for event in averages if event.device_type == DeviceType.CUDA]
    if on_device:
        found = [(event.key, event.self_device_time_total / 1e3, event.count) for event in on_device]
    else:
        found = [(event.key, event.self_cpu_time_total / 1e3, event.count) for event in averages]
    return sorted((entry for entry in found if entry[1] > 0), key=lambda entry: -entry[1])


def flops_by_class(config: UNetConfig, latent_size: int, num_tokens: int = 77) -> dict[str, float]:
    """FLOP for training on one image, by class: three forward passes, as everywhere.

    Attention's are the batched matrix products of plain attention.
    """
    with torch.device("meta"), torch.no_grad():
        unet = build_unet(config, latent_size).eval()
        unet.set_attn_processor(AttnProcessor())
        latents = torch.empty(1, LATENT_CHANNELS, latent_size, latent_size)
        context = torch.empty(1, num_tokens, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1, dtype=torch.int64), context)
    kinds = {
        "convolution": "convolution",
        "mm": "matmul",
        "addmm": "matmul",
        "bmm": "attention",
        "baddbmm": "attention",
    }
    found: dict[str, float] = defaultdict(float)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        found[kinds[str(operator).split(".")[-1]]] += TRAIN_FACTOR * flops
    return dict(found)


def losses(by_class_ms: dict[str, float], idle_ms: float, flops: dict[str, float], peak: float) -> dict[str, float]:
    """Milliseconds that each class takes beyond its FLOP at the device's peak, the largest first.

    Args:
        by_class_ms: as measured.
        idle_ms: without any kernel.
        flops: of the same work, by class.
        peak: FLOP/s.
    """
    lost = {name: spent - 1e3 * flops.get(name, 0.0) / peak for name, spent in by_class_ms.items()}
    ordered = sorted((lost | {"idle": idle_ms}).items(), key=lambda item: -item[1])
    return {name: round(spent, 2) for name, spent in ordered}
