"""Stage `machine`: versions, and what the device can do at best."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sdtrain.impact.gpus import peak_tflops
from tests.benchmarks.training_loops import CUDA, DEVICE, matmul_flops
from tests.gpu_check.child import Check
from tests.gpu_check.stages import STAGES

# Their distributions have other names than their modules.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "open_clip": "open_clip_torch",
    "yaml": "pyyaml",
}


def measure(check: Check) -> None:
    modules = sorted({module for stage in STAGES for module in stage.modules} | {"torch", "torchcodec", "triton"})
    check.record(versions=_system() | {name: _version(name) for name in modules})
    if CUDA:
        check.record(gpu=_gpu())
    check.record(matmul_tflops=round(matmul_flops(0.3 if check.is_small else 2.0) / 1e12, 3))
    check.record(copy_gb_per_s=round(_copy_bytes_per_s(2**26 if check.is_small else 2**32) / 1e9, 1))


def _version(module: str) -> str | None:
    try:
        return version(_DISTRIBUTIONS.get(module, module))
    except PackageNotFoundError:
        return None


def _system() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if CUDA else None,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "peak_tflops": peak_tflops(properties.name),
    }


def _copy_bytes_per_s(num_bytes: int) -> float:
    """Bytes read and written in a second by a copy within the device's memory."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=DEVICE)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(12):
        started = time.perf_counter()
        target.copy_(source)
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best
