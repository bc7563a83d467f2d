"""Shows a training batch as the network sees it: images of the latents, without and with their noise, and captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtrain.config import TrainConfig
from sdtrain.diffusion import NoiseSchedule, sample_posterior
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import newest_whole
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_scaling_factor
from sdtrain.loading.loader import BatchMaker, DrawnSample
from sdtrain.loading.sample_store import SampleStore
from sdtrain.loading.sources import open_samples
from sdtrain.precision import default_device
from sdtrain.sampling.sampler import decode_latents


@dataclass(frozen=True)
class ShownSample:
    """A sample at a `position` of its batch: `image` is its decoded latent z_0, `noisy` the decoded z_t."""

    position: int
    drawn: DrawnSample
    image: Image.Image
    noisy: Image.Image

    def title(self) -> str:
        """All that was drawn, in a line."""
        drawn, crop = self.drawn, self.drawn.crop
        parts = [f"{self.position}", f"sample {drawn.index:,}, epoch {drawn.epoch}", f"t = {drawn.timestep}"]
        if crop:
            box = ", ".join(f"{side:.4g}" for side in crop.box)
            parts.append(f"crop ({box}) of {crop.source_px[0]} x {crop.source_px[1]} px")
        state = "dropped" if drawn.is_dropped else "kept"
        return ", ".join([*parts, f"caption {state} (source {drawn.source})"])

    def row(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"position": self.position} | asdict(self.drawn)


def show_batch(
    config: TrainConfig, step: int, positions: Iterable[int], run: Path | None = None
) -> Iterator[ShownSample]:
    """Yields samples of the batch of optimizer step `step`, counted from 0, exactly as training draws them.

    UserError if the step is not one of the config's, a position not one of the batch, or the data are not those that
    `run`, if given, was trained on.
    """
    wanted = list(positions)
    if not 0 <= step < config.steps:
        raise UserError(f"Step {step:,} is none of this run: it has steps 0 to {config.steps - 1:,}.")
    if not wanted or not 0 <= min(wanted) <= max(wanted) < config.global_batch_size:
        raise UserError(f"A batch has the samples 0 to {config.global_batch_size - 1:,}; choose among these.")
    if config.micro_batch_size == "auto":  # which changes no sample
        config = config.model_copy(update={"micro_batch_size": 1})
    device = torch.device(default_device())
    scaling_factor, schedule = vae_scaling_factor(config.vae), NoiseSchedule(config.diffusion, device)
    store = open_samples(config, scaling_factor)
    _require_same_data(store, config, run)
    maker = BatchMaker(store, load_text_encoder(config.text_encoder)[0], config, rank=0, world_size=1)
    vae = load_vae(config.vae).to(device)
    for position in wanted:
        batch, drawn = maker.drawn(step, position)
        batch = batch.to(device)
        latents = sample_posterior(batch.moments, batch.posterior, scaling_factor)
        noisy = schedule.add_noise(latents, batch.noise, batch.timesteps)
        image, noisy_image = decode_latents(vae, torch.cat([latents, noisy]), config.vae)
        yield ShownSample(position, drawn, image, noisy_image)


def _require_same_data(store: SampleStore, config: TrainConfig, run: Path | None) -> None:
    checkpoint = newest_whole(run) if run else None
    if checkpoint and not store.has_digest(checkpoint.layout.data_digest):
        raise UserError(
            f"{config.data.name} does not hold the latents on which {run} was trained, so its batches cannot be shown. "
            "Name the dataset as it was then with --data."
        )
