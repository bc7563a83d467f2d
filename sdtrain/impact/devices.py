"""What devices draw at most, where nothing was measured."""

from __future__ import annotations

import re

CORE_W = 7.0
"""Assumed for a busy core of a server's CPU, its share of the package included: 225 to 350 W of 32 to 64 cores are 4 to
10 W a core."""

# Board power in W as the makers' data sheets give it, by a part of the device's name; the first match counts.
_BOARD_W = {
    "A100-PCIE-40GB": 250.0,
    "A100 PCIe 40GB": 250.0,
    "A100 80GB PCIe": 300.0,
    "A100-PCIE-80GB": 300.0,
    "A100": 400.0,
    "H100 PCIe": 350.0,
    "H100 NVL": 400.0,
    "H100": 700.0,
    "H200 NVL": 600.0,
    "H200": 700.0,
    "GB200": 1200.0,
    "B200": 1000.0,
    "L40S": 350.0,
    "L40": 300.0,
    "L4": 72.0,
    "A10G": 300.0,
    "A10": 150.0,
    "V100-PCIE": 250.0,
    "V100": 300.0,
    "T4": 70.0,
    "RTX 4090": 450.0,
    "RTX 3090": 350.0,
}


def board_watts(device: str) -> float | None:
    """A GPU's stated board power, in W; None for CPUs and for GPUs that are not in the table, such as laptops'."""
    if re.search(r"\b(laptop|max-q|mobile)\b", device, re.IGNORECASE):
        return None
    return next((watts for part, watts in _BOARD_W.items() if re.search(_whole(part), device, re.IGNORECASE)), None)


def _whole(part: str) -> str:
    return rf"(?<!\w){re.escape(part)}(?!\w)"
