"""Trains the demo's tiny VAE.

The weights in sdtrain/demo/weights/vae were made by these commands:

    python -m sdtrain.demo.train_vae --block-weight 0 --out first
    python -m sdtrain.demo.train_vae --init first --steps 1500 --lr 1.5e-3 --images 2000 --out second
    python -m sdtrain.demo.train_vae --init second --steps 1200 --lr 1.2e-3 --out sdtrain/demo/weights/vae

A narrower SD v1 VAE (AutoencoderKL, four levels, 8x smaller latents of 4 channels), in bf16 autocast about half an hour
on 2 cores; it reconstructs new scenes with a PSNR of 28.8 dB.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from sdtrain.demo.images import COLORS, SHAPES, draw, random_scene

RESOLUTION_PX = 64
KL_WEIGHT = 2e-4
EDGE_WEIGHT = 0.5


def build_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL of about 0.9 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION_PX,
    )


def draw_pool(num_images: int, resolution_px: int, seed: int) -> torch.Tensor:
    """(num_images, 3, resolution_px, resolution_px) uint8 images of random scenes, all pairs equally often."""
    rng = np.random.default_rng(seed)
    pool = np.empty((num_images, resolution_px, resolution_px, 3), np.uint8)
    for i in range(num_images):
        scene = random_scene(rng, str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)))
        image = draw(scene, 4 * resolution_px, 4 * resolution_px)
        pool[i] = np.asarray(image.resize((resolution_px, resolution_px), Image.Resampling.BICUBIC))
    return torch.from_numpy(pool).permute(0, 3, 1, 2).contiguous()


def reconstruction_loss(pixels: torch.Tensor, decoded: torch.Tensor, block_weight: float) -> torch.Tensor:
    """L1 of pixels and edges, plus the squared error of 8x8 block means, of (B, 3, H, W) images.

    L1 alone settles for two hues (warm and cold); the block term separates all six.
    """
    edges = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
    blocks = F.mse_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(pixels, 8))
    return F.l1_loss(decoded, pixels) + EDGE_WEIGHT * edges + block_weight * blocks


def train(vae: AutoencoderKL, pool: torch.Tensor, steps: int, batch_size: int, lr: float, block_weight: float) -> None:
    """Trains in place with AdamW and a one-cycle schedule on (N, 3, H, W) uint8 images."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    generator, started = torch.Generator().manual_seed(0), time.monotonic()
    for step in range(steps):
        picked = pool[torch.randint(len(pool), (batch_size,), generator=generator)]
        pixels = picked.float() / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        loss = (
            reconstruction_loss(pixels, decoded, block_weight)
            + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def latents_std(vae: AutoencoderKL, pool: torch.Tensor) -> float:
    """Standard deviation of the sampled latents; its inverse is the scaling factor (SD v1: 1 / 0.18215)."""
    return float(vae.encode(pool[:256].float() / 127.5 - 1).latent_dist.sample().std())


def main() -> None:
    """Trains and saves in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--block-weight", type=float, default=4.0, help="of the mean colours of 8x8 blocks")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--init", type=Path, help="go on from these weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.init).float() if args.init else build_vae()
    pool = draw_pool(args.images, RESOLUTION_PX, seed=1)
    train(vae, pool, args.steps, args.batch_size, args.lr, args.block_weight)
    vae.register_to_config(scaling_factor=round(1 / latents_std(vae, pool), 5))
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
