"""The precisions in which weights are handed on."""

from __future__ import annotations

import torch

from sdtrain.errors import UserError
from sdtrain.precision import Fixed, resolve

DTYPES: dict[Fixed, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """What `precision: auto` means on `device`, by default the GPU, if there is one."""
    return DTYPES[resolve("auto", device)]


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor on the host, rounded to `dtype`.

    Raises:
        UserError: fp16 cannot hold its numbers, which would become infinite.
    """
    result = tensor.detach().to("cpu", dtype)
    if dtype is torch.float16 and not torch.isfinite(result).all():
        raise UserError(f"{name} has numbers that fp16 cannot hold (beyond 65504, or not finite). Export bf16 or fp32.")
    return result
