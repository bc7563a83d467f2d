"""A UNet whose random weights do not make its output zero."""

from __future__ import annotations

from typing import Any

import torch

from sdtrain.config.sections import UNetConfig
from sdtrain.models.unet import build_unet
from tests.benchmarks.training_loops import DEVICE


def build_random_unet(config: UNetConfig, latent_size: int) -> Any:
    """A UNet in fp32, made on the device, which draws SD v1's numbers in a moment; a CPU takes ten seconds."""
    with DEVICE:
        unet = build_unet(config, latent_size)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet
