"""Power, for unmeasured energy, and speed of GPUs from their data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Board power in W, and dense bf16 TFLOP/s; None if the data sheet was not consulted."""

    watts: float | None
    tflops: float | None = None


# By a part of the device's name; the first match wins.
_GPUS = {
    "A100-PCIE-40GB": Gpu(250.0, 312.0),
    "A100 PCIe 40GB": Gpu(250.0, 312.0),
    "A100 80GB PCIe": Gpu(300.0, 312.0),
    "A100-PCIE-80GB": Gpu(300.0, 312.0),
    "A100": Gpu(400.0, 312.0),
    "H100 PCIe": Gpu(350.0, 756.0),
    "H100 NVL": Gpu(400.0, 989.4),
    "H100": Gpu(700.0, 989.4),
    "H200 NVL": Gpu(600.0, 989.4),
    "H200": Gpu(700.0, 989.4),
    "GH200": Gpu(None, 989.4),
    "GB200": Gpu(1200.0, 2500.0),
    "B200": Gpu(1000.0, 2250.0),
    "L40S": Gpu(350.0, 362.0),
    "L40": Gpu(300.0),
    "L4": Gpu(72.0),
    "A10G": Gpu(300.0, 125.0),
    "A10": Gpu(150.0, 125.0),
    "V100-PCIE": Gpu(250.0),
    "V100": Gpu(300.0),
    "T4": Gpu(70.0),
    "RTX 4090": Gpu(450.0, 165.2),
    "RTX 3090": Gpu(350.0),
}
_UNKNOWN = Gpu(None)


def board_watts(device: str) -> float | None:
    """A GPU's stated board power in W; None for CPUs and unlisted GPUs."""
    return _find(device).watts


def peak_tflops(device: str) -> float | None:
    """A GPU's stated dense bf16 TFLOP/s; None as in `board_watts`."""
    return _find(device).tflops


def _find(device: str) -> Gpu:
    if re.search(r"\b(laptop|max-q|mobile)\b", device, re.IGNORECASE):
        return _UNKNOWN  # another chip and power under the same number
    return next((gpu for part, gpu in _GPUS.items() if re.search(_whole(part), device, re.IGNORECASE)), _UNKNOWN)


def _whole(part: str) -> str:
    return rf"(?<!\w){re.escape(part)}(?!\w)"
