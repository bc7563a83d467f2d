"""Applies a run's speed settings: backends, attention kernels, compilation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.config.sections import SpeedConfig
from sdtrain.errors import UserError
from sdtrain.models.group_norm import GroupNormSilu
from sdtrain.models.unet import memory_format

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
# The blocks of one class share their code, and so this limit: SD v1 has about 20 shapes of residual blocks.
_MAX_SHAPES = 64


def set_backends(config: SpeedConfig) -> None:
    """Configures cuDNN, matrix products and all other operations in this process.

    With `deterministic`, PyTorch's flash and memory-efficient attention avoid atomic additions in the backward pass,
    cuDNN's attention is off, and an operation without a deterministic algorithm raises an error.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not config.deterministic
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cuda.matmul.allow_tf32 = config.tf32


def attention_kernels(config: SpeedConfig) -> AbstractContextManager[None]:
    """Within the block, uses the chosen kernel wherever it applies, and another elsewhere."""
    chosen = _KERNELS.get(config.attention)
    if chosen is None:
        return nullcontext()
    others = [kernel for kernel in (*_KERNELS.values(), SDPBackend.MATH) if kernel is not chosen]
    kernels: AbstractContextManager[None] = sdpa_kernel([chosen, *others], set_priority=True)
    return kernels


def compile_unet(unet: UNet2DConditionModel, config: SpeedConfig) -> None:
    """Compiles the UNet in place, on its first forward pass; its class and its parameters' names stay.

    All batches have one shape, so every graph is specialised for it. Inductor is forced to keep channels_last: alone
    it would not where a 3 x 3 convolution narrows by half or more, as in all of SD v1's up blocks. UserError if the run
    must be deterministic, which this PyTorch cannot promise for compiled code.
    """
    if config.compile == "off":
        return
    if hasattr(torch._inductor.config, "deterministic"):
        torch._inductor.config.deterministic = config.deterministic
    elif config.deterministic:
        raise UserError("speed.deterministic holds for compiled code from PyTorch 2.10 on; set speed.compile to off.")
    torch._dynamo.config.recompile_limit = max(_MAX_SHAPES, torch._dynamo.config.recompile_limit)
    torch._inductor.config.force_layout_optimization = memory_format(unet.device, config) is torch.channels_last
    mode = None if config.compile_mode == "default" else config.compile_mode
    for module in _compiled_parts(unet, config):
        module.compile(mode=mode, dynamic=False)


def _compiled_parts(unet: UNet2DConditionModel, config: SpeedConfig) -> list[nn.Module]:
    """The largest parts of `unet` that `config` wants compiled; none lies within another."""
    if config.compile == "whole":
        return [unet]
    wanted = (GroupNormSilu, GEGLU) if config.compile == "fused" else (BasicTransformerBlock, ResnetBlock2D)
    blocks = [module for module in unet.modules() if isinstance(module, wanted)]
    inside = {part for block in blocks for part in block.modules()}
    # `regional` leaves none of them to PyTorch, whose own norm is faster than the form that is compiled.
    return blocks + [norm for norm in unet.modules() if isinstance(norm, GroupNormSilu) and norm not in inside]


def replays_graphs(config: SpeedConfig) -> bool:
    """Whether CUDA graphs are replayed, each time into the same memory."""
    return config.compile_mode in _WITH_GRAPHS


def begin_graphs(config: SpeedConfig) -> None:
    """Marks a new forward pass, so that CUDA graphs may reuse the memory of the last one's results."""
    if replays_graphs(config):
        torch.compiler.cudagraph_mark_step_begin()
