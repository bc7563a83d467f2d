"""Names that users choose from; imports nothing, because settings are read before any library is needed."""

from __future__ import annotations

from typing import Literal

Weights = Literal["ema", "raw"]
SamplerName = Literal["plms", "ddim", "dpm"]
Resize = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]
