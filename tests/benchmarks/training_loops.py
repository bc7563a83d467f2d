"""The contenders of the training benchmark, each for a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class TimeUpError(Exception):
    """Ends a loop that would go on for ever."""


@dataclass
class Clock:
    """Asked before each optimizer step: times `seconds` of them after `num_warm` others, then raises TimeUpError."""

    num_warm: int
    seconds: float
    asked: int = 0
    started: float = 0.0
    step_s: float = field(default=0.0)

    def __call__(self) -> bool:
        if self.asked == self.num_warm:
            self.started = _now()
        timed = self.asked - self.num_warm
        if timed > 0 and time.perf_counter() - self.started >= self.seconds:
            self.step_s = (_now() - self.started) / timed
            raise TimeUpError
        self.asked += 1
        return False


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def run_ours(settings: str, folder: str, seconds: float) -> dict[str, float]:
    """Our training, as `deepspeed sdtrain/train.py` runs it, with its checks and its log."""
    from sdtrain.config import load_config
    from sdtrain.training.distributed import join

    config = load_config(settings)
    ranks = join(None)
    try:
        return time_training(config, Path(folder) / "ours", ranks, Clock(config.log_every, seconds))
    finally:
        ranks.close()


def time_training(config: Any, folder: Path, ranks: Any, clock: Clock) -> dict[str, Any]:
    """Trains in this process until the clock ends it; `data_wait` is None if it logged once or never."""
    from sdtrain.train import train
    from sdtrain.training.run_dir import RunDir

    run_dir = RunDir(folder)
    with suppress(TimeUpError):
        train(config, run_dir, ranks, stop_requested=clock)
    waits = [float(row["data_wait"]) for row in run_dir.log.rows()[1:]]
    data_wait = round(float(np.mean(waits)), 4) if waits else None
    return _speed(clock, config.global_batch_size) | {"data_wait": data_wait}


def run_stock(settings: str, folder: str, seconds: float) -> dict[str, float]:
    """The steps of diffusers' examples/text_to_image/train_text_to_image.py with its --use_ema, on the same latents.

    Its VAE is left out, for latents are cached here; it still draws from their posterior. As there: autocast over
    float32 weights, torch's AdamW, a clipped gradient, EMAModel, the loss read in every micro-step, a loader without
    workers, and no caption dropout.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel

    from sdtrain.config import load_config
    from sdtrain.formats.frozen import vae_scaling_factor
    from sdtrain.models.unet import build_unet
    from sdtrain.precision import resolve, torch_dtype

    config = load_config(settings)
    accumulation = config.accumulation(1)
    precision = resolve(config.precision)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(mixed_precision=mixed, gradient_accumulation_steps=accumulation, cpu=not CUDA)
    torch.manual_seed(config.seed)
    unet = build_unet(config.unet, config.latent_size)
    unet.train()
    average = EMAModel(unet.parameters(), decay=config.ema.decay)
    average.to(accelerator.device)
    text_encoder = CLIPTextModel.from_pretrained(Path(config.text_encoder, "text_encoder"))
    text_encoder.requires_grad_(False).to(accelerator.device, torch_dtype(precision))
    chosen = config.optimizer
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=chosen.lr, betas=chosen.betas, weight_decay=chosen.weight_decay, eps=chosen.eps
    )
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.schedule.warmup_steps)
    loader = torch.utils.data.DataLoader(_Latents(config), batch_size=config.micro_batch_size, shuffle=True)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    scheduler, scale = DDPMScheduler(beta_schedule="scaled_linear"), vae_scaling_factor(config.vae)
    clock, batches, train_loss = Clock(2, seconds), _for_ever(loader), 0.0
    try:
        while not clock():
            for _ in range(accumulation):
                moments, token_ids = next(batches)
                with accelerator.accumulate(unet):
                    mean, logvar = moments.float().chunk(2, dim=1)
                    latents = scale * (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
                    noise = torch.randn_like(latents)
                    timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
                    noisy = scheduler.add_noise(latents, noise, timesteps).to(torch_dtype(precision))
                    context = text_encoder(token_ids).last_hidden_state
                    loss = F.mse_loss(unet(noisy, timesteps, context).sample.float(), noise)
                    train_loss += accelerator.gather(loss.repeat(len(latents))).mean().item()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                    optimizer.step()
                    rate.step()
                    optimizer.zero_grad()
            average.step(unet.parameters())
    except TimeUpError:
        return _speed(clock, config.global_batch_size)
    raise AssertionError("the clock ends the loop")


class _Latents(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Moments from the shards, and captions tokenised beforehand, as the example's dataset has them."""

    def __init__(self, config: Any):
        from sdtrain.formats.frozen import load_text_encoder
        from sdtrain.models.text import tokenize

        tokenizer, _ = load_text_encoder(config.text_encoder)
        self._shape = (8, config.latent_size, config.latent_size)
        self._rows = []
        for path in sorted(Path(config.data.root, "latents").glob("[0-9]*.parquet")):
            table = pq.read_table(path, columns=["offset", "num_bytes", "caption"]).to_pydict()
            contents = np.memmap(path.with_suffix(".tar"), np.uint8, mode="r")
            tokens = tokenize(tokenizer, table["caption"])
            self._rows += [(contents, offset, ids) for offset, ids in zip(table["offset"], tokens, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        contents, offset, token_ids = self._rows[number]
        num_bytes = 2 * int(np.prod(self._shape))
        moments = contents[offset : offset + num_bytes].view(np.float16).reshape(self._shape)
        return torch.from_numpy(moments.copy()), token_ids


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _speed(clock: Clock, global_batch_size: int) -> dict[str, float]:
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return {"images_per_s": global_batch_size / clock.step_s, "memory_gb": round(memory, 1)}


def matmul_flops(seconds: float = 2.0) -> float:
    """FLOP/s of the best square matrix product here: what no network can exceed."""
    if CUDA:
        return _matmul_flops(8192, torch.bfloat16, seconds)
    return max(_matmul_flops(1024, dtype, seconds) for dtype in (torch.bfloat16, torch.float32))


def _matmul_flops(side: int, dtype: torch.dtype, seconds: float) -> float:
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    began, best, count = _now(), 0.0, 10 if CUDA else 1
    while time.perf_counter() - began < seconds:
        started = _now()
        for _ in range(count):
            a @ b
        best = max(best, 2 * side**3 * count / (_now() - started))
    return best
