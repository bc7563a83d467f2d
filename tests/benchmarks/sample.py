"""Images from prompts: our sampler beside diffusers' pipeline called for one prompt after another, in one run.

    python -m tests.benchmarks.sample [--quick]

Both sides load the same folder of random weights, which take as long as real ones, and go from prompts to PNG files:
50 PLMS steps (20 with --quick on a CPU) with guidance 7.5. The peer is the loop of diffusers' own examples: it loads
the folder by `StableDiffusionPipeline.from_pretrained`, and for every prompt does
`pipeline(prompt, generator=...).images[0].save(...)`, in the precision named beside its rate and with diffusers'
default attention, PyTorch's fused one. Ours draws the same prompts in batches.

On CUDA the networks are SD v1's at their real sizes, images are of 512 px, ours in bf16 with compiled blocks, the
peer's in fp16. On a CPU the UNet has 37.5 million parameters, images are of 128 px, and the peer runs in the
precision that ours has (`auto`), and in float32, in which diffusers loads by default. The sides take turns, batch by
batch, so that other work on the machine slows all of them; each ratio is the median over the batches. Loading and a
warm-up are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from sdtrain.config import DiffusionConfig
from sdtrain.config.sections import SpeedConfig, UNetConfig
from sdtrain.formats.compvis_layout import sd_v1
from sdtrain.formats.frozen import load_tokenizer
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.precision import fast_dtype, resolve
from sdtrain.sampling.batch import Job, Model, make_jobs
from sdtrain.sampling.output_folder import SampleFolder, Writer
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from tests.benchmarks.random_unet import build_random_unet
from tests.benchmarks.training_loops import CUDA, DEVICE

SCALE = 7.5
# On a CPU the peer has the precision that `auto` gives us, and float32, in which diffusers loads by default.
PEERS = {"fp16": torch.float16} if CUDA else {resolve("auto"): fast_dtype(), "fp32": torch.float32}
Draw = Callable[[Sequence[Job], int], None]


@dataclass(frozen=True)
class Size:
    """The networks, and what they draw.

    Attributes:
        side_px: of an image.
        unet: channels of the UNet's levels; the rest is SD v1's.
        vae: the same of the VAE.
        text_layers: of the text encoder.
    """

    side_px: int
    unet: tuple[int, ...] = UNetConfig().block_out_channels
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text_layers: int = 12


SIZE = Size(512) if CUDA else Size(128, (64, 128, 256, 256), (32, 64, 128, 128), 2)


def write_model(folder: Path, size: Size = SIZE) -> Path:
    """A pipeline with random weights that do not make the output zero."""
    torch.manual_seed(0)
    tokenizer, real = load_tokenizer("demo"), sd_v1()
    tokenizer.model_max_length = real.text_encoder["max_position_embeddings"]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = dict(real.text_encoder) | ends | {"num_hidden_layers": size.text_layers}
    vae = dict(real.vae) | {"block_out_channels": list(size.vae)}
    unet = build_random_unet(UNetConfig(block_out_channels=size.unet), size.side_px // 8)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(vae),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(text)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampling_scheduler(DiffusionConfig()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def ours(model: Path, output: Path, batch_size: int, compiling: Literal["off", "regional"] | None = None) -> Draw:
    """Batches through our sampler; on CUDA it compiles unless told otherwise."""
    speed = SpeedConfig(compile=compiling or ("regional" if CUDA else "off"))
    chosen = Model(model, speed=speed)
    sampler = Sampler(load_networks(model, dtype=chosen.dtype, speed=speed))

    def draw(jobs: Sequence[Job], num_steps: int) -> None:
        settings = SampleSettings(SCALE, num_steps, batch_size=batch_size)
        with Writer(SampleFolder(output, chosen, settings)) as writer:
            images = sampler.sample([job.prompt for job in jobs], [job.seed for job in jobs], settings)
            for job, image in zip(jobs, images, strict=True):
                writer.save(job, image, flagged=False)

    return draw


def peer(model: Path, output: Path, dtype: torch.dtype) -> Draw:
    """One prompt after another through diffusers' pipeline."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(DEVICE)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    output.mkdir()

    def draw(jobs: Sequence[Job], num_steps: int) -> None:
        for job in jobs:
            generator = torch.Generator(DEVICE).manual_seed(job.seed)
            options = {"num_inference_steps": num_steps, "guidance_scale": SCALE, "generator": generator}
            pipeline(job.prompt, **options).images[0].save(output / f"{job.seed}.png")

    return draw


def timed(draw: Draw, jobs: Sequence[Job], num_steps: int) -> tuple[float, float]:
    """Seconds by the clock and of this process's cores."""
    started = time.perf_counter(), time.process_time()
    draw(jobs, num_steps)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(folder: Path, quick: bool) -> dict[str, float | str | int]:
    """Rates of all sides."""
    batch_size, num_batches = (32, 1 if quick else 4) if CUDA else (8, 1 if quick else 3)
    num_steps = 50 if CUDA or not quick else 20
    model = write_model(folder / "model")
    sides = {"ours": ours(model, folder / "ours", batch_size)}
    sides |= {f"pipeline {name}": peer(model, folder / name, dtype) for name, dtype in PEERS.items()}
    prompts = [f"a painting of thing number {number}" for number in range(batch_size * num_batches)]
    jobs = make_jobs(prompts, 0, 1)
    for draw in sides.values():
        draw(jobs[:batch_size], 1)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for first in range(0, len(jobs), batch_size):
        for name, draw in sides.items():
            seconds[name].append(timed(draw, jobs[first : first + batch_size], num_steps))
            print(f"{name:14} {batch_size / seconds[name][-1][0]:8.3f} images/s of {SIZE.side_px} px", flush=True)
    figures: dict[str, float | str | int] = {
        "images_per_s": round(len(jobs) / sum(wall for wall, _ in seconds["ours"]), 3)
    }
    for name in PEERS:
        key = "vs_pipeline" if name == next(iter(PEERS)) else f"vs_pipeline_{name}"
        pairs = list(zip(seconds["ours"], seconds[f"pipeline {name}"], strict=True))
        figures[key] = round(statistics.median(theirs[0] / own[0] for own, theirs in pairs), 3)
        if not CUDA:
            figures[f"{key}_by_processor_time"] = round(statistics.median(t[1] / own[1] for own, t in pairs), 3)
    return figures | {"side_px": SIZE.side_px, "num_steps": num_steps, "batch_size": batch_size, "device": str(DEVICE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one batch; on a CPU with 20 steps")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), quick)))


if __name__ == "__main__":
    main()
