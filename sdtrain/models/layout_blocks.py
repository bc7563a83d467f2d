"""diffusers' blocks of SD v1, computing the same without the copies that undo channels_last.

diffusers makes activations contiguous before a shortcut, behind attention, and in batches of 64 and more before they
are doubled; it divides residuals by 1, and gives norms and activations to a compiler separately.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from sdtrain.models.group_norm import GroupNormSilu

_INT_MAX = 2**31 - 1


class LayoutResnetBlock(ResnetBlock2D):
    """A residual block between a time embedding and its image, without resampling."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Returns (B, C', H, W) of an image (B, C, H, W) and a time embedding (B, E)."""
        hidden = self.conv1(self.norm1(input_tensor))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class LayoutTransformer(Transformer2DModel):
    """Attention blocks between two convolutions of 1 x 1."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        image = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        projected: torch.Tensor = self.proj_out(image)
        return projected + residual


class LayoutUpsample(Upsample2D):
    """Doubles height and width, and convolves."""

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        """Returns (B, C, 2H, 2W), or of `output_size`, of an image (B, C, H, W)."""
        # https://github.com/pytorch/pytorch/issues/141831: more elements overflow in channels_last
        if output_size is not None or 4 * hidden_states.numel() > _INT_MAX:
            given: torch.Tensor = super().forward(hidden_states, output_size)
            return given
        doubled: torch.Tensor = self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return doubled


def keep_layout(unet: UNet2DConditionModel, is_fused: bool) -> None:
    """Replaces the blocks of `unet` in place, but for those that SD v1 has not; parameters and their names stay."""
    for module in unet.modules():
        if _is_plain_resnet(module):
            module.__class__ = LayoutResnetBlock
            for norm in (module.norm1, module.norm2):
                GroupNormSilu.replace(norm, with_silu=True, is_fused=is_fused)
        elif type(module) is Transformer2DModel and module.is_input_continuous and not module.use_linear_projection:
            module.__class__ = LayoutTransformer
            GroupNormSilu.replace(module.norm, with_silu=False, is_fused=is_fused)
        elif type(module) is Upsample2D and module.use_conv and module.interpolate and module.name == "conv":
            module.__class__ = LayoutUpsample if module.norm is None else Upsample2D
    if type(unet.conv_norm_out) is nn.GroupNorm and isinstance(unet.conv_act, nn.SiLU):
        GroupNormSilu.replace(unet.conv_norm_out, with_silu=True, is_fused=is_fused)
        unet.conv_act = nn.Identity()


def _is_plain_resnet(module: nn.Module) -> bool:
    return bool(
        type(module) is ResnetBlock2D
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and isinstance(module.nonlinearity, nn.SiLU)
        and not (module.up or module.down or module.skip_time_act)
        and module.output_scale_factor == 1.0
    )
