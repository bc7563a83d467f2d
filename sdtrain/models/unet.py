"""Builds the UNet as CompVis initialises it, and prepares it for its device."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from sdtrain.config.sections import SpeedConfig, UNetConfig
from sdtrain.models.layout import store_channels_last
from sdtrain.models.layout_blocks import keep_layout

LATENT_CHANNELS = 4


def build_unet(config: UNetConfig, latent_size: int) -> UNet2DConditionModel:
    """An untrained fp32 UNet, initialised as CompVis does; `latent_size` goes into its config for pipelines."""
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_num_groups,
    )
    zero_initialise(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


@torch.no_grad()
def zero_initialise(unet: UNet2DConditionModel) -> None:
    """Zeroes the last layer of every residual branch, and the output.

    So every block begins as the identity and the first prediction is 0: `zero_module` in CompVis/stable-diffusion,
    ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py. diffusers' own constructor does not.
    """
    last_layers: list[torch.nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last_layers.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            last_layers.append(module.proj_out)
    for layer in last_layers:
        for parameter in layer.parameters():
            parameter.zero_()


def prepare_for(
    unet: UNet2DConditionModel, device: torch.device, speed: SpeedConfig | None = None, for_training: bool = False
) -> UNet2DConditionModel:
    """Puts the UNet on `device` with the attention and memory layout that `speed` sets, or that are fastest there.

    On the CPU the fused attention's bf16 backward pass took 43 % of a training step of the tiny UNet; plain matrix
    products are 1.6 times faster. channels_last pays off on CUDA only. Compile afterwards: the parts that a compiler
    fuses are put in place here.
    """
    speed = speed or SpeedConfig()
    is_plain = speed.attention == "plain" or (speed.attention == "auto" and device.type == "cpu")
    unet.set_attn_processor(AttnProcessor() if is_plain else AttnProcessor2_0())
    layout = memory_format(device, speed)
    if layout is torch.channels_last or speed.compile == "fused":
        keep_layout(unet, is_fused=speed.compile != "off")
    if not for_training:
        return unet.to(device=device, memory_format=layout)
    if layout is torch.channels_last:  # ZeRO's flat vector has no strides
        store_channels_last(unet)
    return unet.to(device=device)


def memory_format(device: torch.device, speed: SpeedConfig) -> torch.memory_format:
    """The layout of the UNet's input, which its convolutions pass on."""
    channels_last = device.type != "cpu" if speed.channels_last is None else speed.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format
