"""GroupNorm with SiLU as one function that keeps the memory layout, for compilers to fuse."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, with_silu: bool
) -> torch.Tensor:
    """GroupNorm (Wu and He 2018, arXiv:1803.08494), and SiLU if asked for, of (B, C, H, W); computes in float32.

    Moments are taken of each channel and then of each group (the law of total variance): channels_last images are read
    along their channels, and nothing cancels as in E[x²] - E[x]². The result has the layout and dtype of `images`,
    where PyTorch's own on CUDA is always contiguous. Without a compiler it is slower than PyTorch's.
    """
    wide = images.float()
    variance, mean = (moment.unflatten(1, (num_groups, -1)) for moment in torch.var_mean(wide, (2, 3), correction=0))
    variance = variance.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)
    scale = weight.unflatten(0, (num_groups, -1)) * (variance + eps).rsqrt()
    shift = bias.unflatten(0, (num_groups, -1)) - mean.mean(2, keepdim=True) * scale
    normed = wide * scale.flatten(1)[:, :, None, None] + shift.flatten(1)[:, :, None, None]
    return (F.silu(normed) if with_silu else normed).to(images.dtype)


class GroupNormSilu(nn.GroupNorm):
    """GroupNorm with the activation behind it.

    Attributes:
        with_silu: whether there is one.
        is_fused: whether it is compiled, alone or with what surrounds it, and so takes the form that a compiler fuses.
    """

    with_silu: bool
    is_fused: bool

    @classmethod
    def replace(cls, norm: nn.GroupNorm, with_silu: bool, is_fused: bool) -> None:
        """Turns `norm` into one, in place."""
        norm.__class__ = cls
        replaced = cast("GroupNormSilu", norm)
        replaced.with_silu, replaced.is_fused = with_silu, is_fused

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name that PyTorch has
        """(B, C, H, W), in either layout."""
        if self.is_fused:
            return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, self.with_silu)
        normed = super().forward(input)
        return F.silu(normed) if self.with_silu else normed
