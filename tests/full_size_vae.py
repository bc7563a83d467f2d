"""Stable Diffusion v1's autoencoder at its real size, with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

NUM_PARAMETERS = 83_653_863


def write_full_size_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    assert sum(p.numel() for p in vae.parameters()) == NUM_PARAMETERS
    vae.save_pretrained(folder)
    return folder
