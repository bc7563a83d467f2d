"""Samples images for many prompts on all devices of a machine, and records in each how it was made."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtrain import __version__
from sdtrain.config.sections import SpeedConfig
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.models.timesteps import are_respaced
from sdtrain.options import Weights
from sdtrain.precision import decoder_dtype, fast_dtype
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks

Sign = Callable[[bytes], bytes]
"""Adds a signature to a PNG's bytes."""
RECORD = "sdtrain"
"""Name of the text chunk in which an image has its record."""


@dataclass(frozen=True)
class Job:
    """One image to make; its file has its `number`, or where that is None its seed, if no other image has it."""

    prompt: str
    seed: int
    number: int | None = None


@dataclass(frozen=True)
class Model:
    """The networks to sample from; see `load_networks`."""

    path: Path
    weights: Weights = "ema"
    dtype: torch.dtype = field(default_factory=fast_dtype)
    tokenizer: str | None = None
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype in which images are decoded on this machine."""
        return decoder_dtype(self.dtype)


def make_jobs(prompts: Sequence[str], seed: int, per_prompt: int) -> list[Job]:
    """Makes `per_prompt` jobs for each prompt in turn, with seeds counted up from `seed`."""
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    return [Job(prompt, seed + number) for number, prompt in enumerate(repeated)]


def make_seeded_jobs(prompts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Makes a job for every prompt and seed, numbered from the first seed; a prompt named twice counts once."""
    pairs = [(prompt, seed) for prompt in dict.fromkeys(prompts) for seed in seeds]
    if len(pairs) == len(seeds):
        return [Job(*pair) for pair in pairs]
    return [Job(*pair, number) for number, pair in enumerate(pairs, seeds[0])]


def split_batches(jobs: Sequence[Job], settings: SampleSettings) -> list[Sequence[Job]]:
    """Splits jobs into batches, before distribution, so that an image is the same on whichever device."""
    size = settings.batch_size
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


def rank_and_device() -> tuple[int, int, str | None]:
    """Rank, world size and device under `torchrun` or `deepspeed`; without a launcher 0, 1 and None.

    UserError if this machine has more ranks than GPUs.
    """
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world_size == 1:
        return 0, 1, None
    local, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if num_gpus and local >= num_gpus:
        raise UserError(f"Rank {local} of this machine has no GPU: there are {num_gpus}. Start as many ranks as GPUs.")
    return rank, world_size, f"cuda:{local}" if num_gpus else "cpu"


def wait_for_all() -> None:
    """Waits for all processes of the launcher."""
    if rank_and_device()[1] > 1:
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()


def all_devices(num_processes: int | None = None) -> list[str]:
    """Every GPU; without one, the CPU once per requested process. UserError for more processes than GPUs."""
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return ["cpu"] * (num_processes or 1)
    if num_processes and num_processes > num_gpus:
        raise UserError(f"There are {num_gpus} GPUs, too few for {num_processes} processes.")
    return [f"cuda:{number}" for number in range(num_processes or num_gpus)]


def draw(
    model: Model, jobs: Sequence[Job], settings: SampleSettings, devices: Sequence[str]
) -> Iterator[tuple[Job, Image.Image]]:
    """Yields images in the order of the jobs, as soon as they are drawn.

    UserError if there is no such model, or its outputs are not finite.
    """
    yield from draw_batches(model, split_batches(jobs, settings), settings, devices)


def draw_batches(
    model: Model, batches: Sequence[Sequence[Job]], settings: SampleSettings, devices: Sequence[str]
) -> Iterator[tuple[Job, Image.Image]]:
    """As `draw`, for the batches of `split_batches`."""
    if not batches:
        return
    if len(devices) == 1 or len(batches) == 1:
        sampler = _load(model, devices[0])
        for batch in batches:
            yield from zip(batch, _sample(sampler, batch, settings), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    free: Queue[str] = context.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), context, _begin, (model, free, threads)) as pool:
        try:
            results = pool.map(_sample_here, batches, [settings] * len(batches))
            for batch, images in zip(batches, results, strict=True):
                yield from zip(batch, images, strict=True)
        except BrokenProcessPool as error:
            raise UserError(
                "A process that draws was ended from outside. Is there too little memory? Lower --batch-size."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def description(job: Job, model: Model, settings: SampleSettings) -> dict[str, Any]:
    """Record of how an image is made."""
    made: dict[str, Any] = {"prompt": job.prompt, "seed": job.seed, "guidance_scale": settings.guidance_scale}
    made |= {"num_steps": settings.num_steps, "sampler": settings.sampler or "default", "weights": model.weights}
    made |= {"tokenizer": model.tokenizer} if model.tokenizer else {}
    made |= _settings_in_use(settings)
    # float32 is left out, as in records from before there was a choice
    made |= {"vae_dtype": str(model.vae_dtype)} if model.vae_dtype is not torch.float32 else {}
    return made | {"dtype": str(model.dtype), "model": str(model.path), "version": __version__}


def _settings_in_use(settings: SampleSettings) -> dict[str, Any]:
    """Settings that records from before there were such have not."""
    made: dict[str, Any] = {name: getattr(settings, name) for name in ("negative_prompt", "width", "height")}
    if start := settings.start:
        made |= {"image": start.path.name, "image_sha256": start.digest, "strength": start.strength}
    if are_respaced(settings.sampler, settings.num_steps):
        made["timesteps"] = "spread"
    return {name: value for name, value in made.items() if value}


def save_image(
    path: Path,
    image: Image.Image,
    job: Job,
    model: Model,
    settings: SampleSettings,
    also: Mapping[str, Any] | None = None,
    sign: Sign | None = None,
) -> None:
    """Writes a PNG with `description` and `also` in its text chunk `RECORD`, signed if `sign` is given."""
    made = description(job, model, settings) | dict(also or {})
    text = PngInfo()
    text.add_itxt(RECORD, json.dumps(made, ensure_ascii=False))
    write_png(path, image, text, sign)


def write_png(path: Path, image: Image.Image, text: PngInfo, sign: Sign | None = None) -> None:
    """Writes a PNG with its text, as `sign` returns it, whole or not at all."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text)
    content = file.getvalue()
    with publish(path) as temporary:
        temporary.write_bytes(sign(content) if sign else content)


def _load(model: Model, device: str) -> Sampler:
    return Sampler(
        load_networks(model.path, device, model.dtype, model.weights, model.speed, model.tokenizer, model.vae_dtype)
    )


def _sample(sampler: Sampler, batch: Sequence[Job], settings: SampleSettings) -> list[Image.Image]:
    return sampler.sample([job.prompt for job in batch], [job.seed for job in batch], settings)


@dataclass
class _Worker:
    """State of a pool process; its first batch loads the networks, so that their errors reach the caller."""

    model: Model
    device: str
    sampler: Sampler | None = None


_workers: list[_Worker] = []


def _begin(model: Model, free: Queue[str], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    _workers.append(_Worker(model, free.get()))


def _sample_here(batch: Sequence[Job], settings: SampleSettings) -> list[Image.Image]:
    worker = _workers[0]
    worker.sampler = worker.sampler or _load(worker.model, worker.device)
    return _sample(worker.sampler, batch, settings)
