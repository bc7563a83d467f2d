"""Samples images from prompts with the networks of a model, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.config.sections import SpeedConfig
from sdtrain.diffusion import guide
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.models.backends import attention_kernels, begin_graphs, compile_unet, set_backends
from sdtrain.models.batch_rows import fill_rows
from sdtrain.models.schedulers import make_scheduler
from sdtrain.models.text import tokenize
from sdtrain.models.unet import LATENT_CHANNELS, memory_format, prepare_for
from sdtrain.options import SamplerName, Weights
from sdtrain.precision import decoder_dtype, fast_dtype

_DECODED_AT_ONCE = 8
"""Bounds the memory for decoding, whatever the batch."""


@dataclass(frozen=True)
class Networks:
    """The networks of a text-to-image pipeline.

    `unet` maps latents, timesteps and context to an output whose `sample` is the prediction. It and the text encoder
    compute in `dtype`; the sampler's steps are float32, and the VAE has a dtype of its own. A compiled `unet` gets
    batches of `num_rows` only, or of as many as its first. `source` names the weights' origin in messages.
    """

    unet: Callable[..., Any]
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    scheduler_config: Mapping[str, Any]
    latent_size: int
    dtype: torch.dtype
    source: str
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    num_rows: int = 0


def load_networks(
    path: Path | str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights = "ema",
    speed: SpeedConfig | None = None,
    tokenizer: str | None = None,
    vae_dtype: torch.dtype | None = None,
) -> Networks:
    """Loads the networks of a model.

    Args:
        path: a training run (its newest checkpoint), one of its checkpoints, a diffusers folder, or a CompVis file.
        device: by default CUDA, if available.
        dtype: of UNet and text encoder; by default the device's fast one, as with `precision: auto`.
        weights: averaged or raw; a published model mostly has one kind, which counts as averaged.
        speed: attention kernel, memory layout, compilation.
        tokenizer: for a CompVis file, which holds none: a folder, a hub id or `demo`; by default CLIP's.
        vae_dtype: of the VAE; by default `decoder_dtype`.

    Raises:
        UserError: there is no such model.
    """
    place, speed = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), speed or SpeedConfig()
    if speed.attention == "auto":  # without a backward pass the fused kernel is fast on CPUs too
        speed = speed.model_copy(update={"attention": "sdpa"})
    dtype = dtype or fast_dtype(place)
    model = open_model(path, tokenizer)
    unet, frozen = model.unet(weights), model.frozen()
    set_backends(speed)
    torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns of float32 modules, of which there are none
    unet = prepare_for(unet, place, speed)
    compile_unet(unet, speed)
    return Networks(
        unet=unet,
        vae=place_decoder(frozen.vae, place, vae_dtype or decoder_dtype(dtype, place), speed),
        tokenizer=frozen.tokenizer,
        text_encoder=frozen.text_encoder.to(place, dtype),
        scheduler_config=model.scheduler_config,
        latent_size=unet.config.sample_size,
        dtype=dtype,
        source=str(path),
        speed=speed,
    )


def place_decoder(vae: AutoencoderKL, device: torch.device, dtype: torch.dtype, speed: SpeedConfig) -> AutoencoderKL:
    """Moves a VAE to where and how it decodes."""
    placed: AutoencoderKL = torch.nn.Module.to(vae, device, dtype).to(memory_format=memory_format(device, speed))
    return placed


@dataclass(frozen=True)
class SampleSettings:
    """Sampling settings; the defaults are those of SD v1's samples.

    Guidance scale 1 skips the unconditional half. PLMS calls the UNet `num_steps` + 1 times. `sampler` None takes the
    one that fits the model. UserError if `num_steps` or `batch_size` is below 1.
    """

    guidance_scale: float = 7.5
    num_steps: int = 50
    sampler: SamplerName | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError(f"num_steps ({self.num_steps}) and batch_size ({self.batch_size}) must be at least 1.")


class Sampler:
    """Makes images from prompts, with the networks of `load_networks` or of a training run."""

    def __init__(self, networks: Networks):
        self._networks = networks
        self._device = networks.vae.device
        self._num_rows = networks.num_rows

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings | None = None
    ) -> list[Image.Image]:
        """Samples one image per prompt, with initial noise from its own seed, whatever else is in the batch.

        UserError if prompts and seeds differ in number, or the model's outputs are not finite.
        """
        settings = settings or SampleSettings()
        if len(prompts) != len(seeds):
            raise UserError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt.")
        images: list[Image.Image] = []
        for first in range(0, len(prompts), settings.batch_size):
            part = slice(first, first + settings.batch_size)
            images += self._batch(prompts[part], seeds[part], settings)
        return images

    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings) -> list[Image.Image]:
        with attention_kernels(self._networks.speed):
            latents = self._denoise(prompts, self._initial_noise(seeds), settings)
        return self._decode(latents)

    def _initial_noise(self, seeds: Sequence[int]) -> torch.Tensor:
        shape = (LATENT_CHANNELS, self._networks.latent_size, self._networks.latent_size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self._device)

    def _denoise(self, prompts: Sequence[str], latents: torch.Tensor, settings: SampleSettings) -> torch.Tensor:
        scheduler = make_scheduler(settings.sampler, self._networks.scheduler_config)
        scheduler.set_timesteps(settings.num_steps)
        guided = settings.guidance_scale != 1.0
        context = self._encode(prompts)
        if guided:
            context = torch.cat([self._encode([""]).expand_as(context), context])
        # On the device at once: copies in the loop would make the host wait.
        for timestep, at in zip(scheduler.timesteps, scheduler.timesteps.to(self._device), strict=True):
            inputs = torch.cat([latents, latents]) if guided else latents
            predicted = self._predict(inputs, at, context)
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = guide(unconditional, conditional, settings.guidance_scale)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        if not torch.isfinite(latents).all():
            raise UserError(
                f"The model in {self._networks.source} gives numbers that are not finite, so there is no image. "
                "Export an earlier checkpoint."
            )
        return latents

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's predictions, (B, 4, h, w) float32.

        A compiled one is given batches of one size, in the form that training has: others would be compiled again.
        """
        networks = self._networks
        inputs = latents.to(networks.dtype, memory_format=memory_format(self._device, networks.speed))
        if networks.speed.compile == "off":
            return networks.unet(inputs, timestep, context).sample.float()
        self._num_rows = self._num_rows or len(inputs)
        timesteps, predicted = timestep.repeat(self._num_rows), []
        for part, words in zip(inputs.split(self._num_rows), context.split(self._num_rows), strict=True):
            begin_graphs(networks.speed)
            whole = networks.unet(fill_rows(part, self._num_rows), timesteps, fill_rows(words, self._num_rows)).sample
            # The next graph writes over this one's output, which the sampler keeps for several steps: copy it.
            predicted.append(whole[: len(part)].to(torch.float32, copy=True))
        return torch.cat(predicted)

    def _encode(self, captions: Sequence[str]) -> torch.Tensor:
        token_ids = tokenize(self._networks.tokenizer, captions).to(self._device)
        return self._networks.text_encoder(token_ids).last_hidden_state

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        vae, images = self._networks.vae, list[Image.Image]()
        for part in latents.split(_DECODED_AT_ONCE):
            pixels = vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample.float()
            if not pixels.isfinite().all():
                raise UserError(
                    f"The VAE of {self._networks.source} gives images that are not finite; its weights are damaged."
                )
            rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images += [Image.fromarray(image) for image in rounded]
        return images


def make_grid(images: Sequence[Image.Image], columns: int | None = None, gap_px: int = 2) -> Image.Image:
    """Arranges images of one size on a white sheet, row by row, by default nearly square; UserError without images."""
    if not images:
        raise UserError("There are no images to put on a sheet.")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].width + gap_px, images[0].height + gap_px
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width + gap_px, rows * height + gap_px), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image, (gap_px + column * width, gap_px + row * height))
    return sheet
