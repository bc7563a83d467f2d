"""How much arithmetic one image takes, and how much a GPU could do."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.config import UNetConfig
from sdtrain.impact.gpus import peak_tflops
from sdtrain.models.unet import LATENT_CHANNELS, build_unet

TRAIN_FACTOR = 3
"""A training step costs three forward passes: one forward, two backward; recomputed activations are not counted."""


def forward_flops(config: UNetConfig, latent_size: int, num_tokens: int = 77) -> int:
    """Floating-point operations of one forward pass of the UNet for one image, attention's matrix products included.

    A multiplication with its addition counts as two. SD v1 at 64x64 latents: 803.3 GFLOP.

    Args:
        config: the architecture.
        latent_size: height and width of the latents.
        num_tokens: length of the text's encoding.
    """
    return _forward_flops(config.model_dump_json(), latent_size, num_tokens)


@lru_cache(maxsize=4)
def _forward_flops(config_json: str, latent_size: int, num_tokens: int) -> int:
    config = UNetConfig.model_validate_json(config_json)
    with torch.device("meta"), torch.no_grad():
        unet = build_unet(config, latent_size).eval()
        unet.set_attn_processor(AttnProcessor())  # plain matrix products, which the counter knows on every device
        latents = torch.empty(1, LATENT_CHANNELS, latent_size, latent_size)
        context = torch.empty(1, num_tokens, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1, dtype=torch.int64), context)
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the GPU's data sheet promises; None for CPUs and GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else 1e12 * tflops
