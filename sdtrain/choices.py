"""Names that users choose from, in a place that imports nothing: settings are read before any library is needed."""

from __future__ import annotations

from typing import Literal

Weights = Literal["ema", "raw"]
SamplerName = Literal["plms", "ddim", "dpm"]
Resize = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
"""How Inception's images are brought to their size."""
