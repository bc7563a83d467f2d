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
from sdtrain.formats.stored_model import latent_shape
from sdtrain.models.backends import attention_kernels, begin_graphs, compile_unet, set_backends
from sdtrain.models.batch_rows import fill_rows
from sdtrain.models.schedulers import begin_steps, num_left
from sdtrain.models.text import tokenize
from sdtrain.models.unet import LATENT_CHANNELS, memory_format, prepare_for
from sdtrain.options import SamplerName, Weights
from sdtrain.precision import decoder_dtype, fast_dtype
from sdtrain.sampling.start_image import EncodedImage, StartImage, encode_image

_STEP_PX = 8
"""Pixels to a latent, in SD v1."""
_DECODED_AT_ONCE = 8
"""Bounds the memory for decoding, whatever the batch."""


@dataclass(frozen=True)
class Networks:
    """The networks of a text-to-image pipeline.

    `unet` maps latents, timesteps and context to an output whose `sample` is the prediction. It and the text encoder
    compute in `dtype`; the sampler's steps are float32, and the VAE has a dtype of its own. A compiled `unet` gets
    batches of `num_rows` only, or of as many as its first. `latent_size` is the latents' side, or height and width.
    `source` names the weights' origin in messages.
    """

    unet: Callable[..., Any]
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    scheduler_config: Mapping[str, Any]
    latent_size: int | Sequence[int]
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

    UserError for settings that are out of range or would have no effect; each sampler's largest number of steps is
    checked by `Sampler.sample`.

    Attributes:
        guidance_scale: 1 skips the unconditional half.
        num_steps: PLMS calls the UNet once more.
        sampler: None takes the one that fits the model.
        batch_size: images at once.
        negative_prompt: takes the empty prompt's place in the unconditional half.
        width: in pixels; None is the model's own.
        height: likewise.
        start: an image to begin from, instead of noise alone.
    """

    guidance_scale: float = 7.5
    num_steps: int = 50
    sampler: SamplerName | None = None
    batch_size: int = 16
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    start: StartImage | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError(f"num_steps ({self.num_steps}) and batch_size ({self.batch_size}) must be at least 1.")
        for name, side_px in (("width", self.width), ("height", self.height)):
            if side_px is not None and (side_px < _STEP_PX or side_px % _STEP_PX):
                raise UserError(f"{name} {side_px} has to be a multiple of {_STEP_PX}; {_nearest_sides(side_px)}.")
        if self.negative_prompt and self.guidance_scale == 1:
            raise UserError("A negative prompt has no effect at guidance scale 1, which asks for no second half.")
        if self.start is not None:
            num_left(self.num_steps, self.start.strength)


def _nearest_sides(side_px: int) -> str:
    below = side_px // _STEP_PX * _STEP_PX
    return f"{below} and {below + _STEP_PX} are the nearest" if below > 0 else f"{_STEP_PX} is the smallest"


class Sampler:
    """Makes images from prompts, with the networks of `load_networks` or of a training run."""

    def __init__(self, networks: Networks):
        self._networks = networks
        self._device = networks.vae.device
        self._num_rows = networks.num_rows
        self._encoded: tuple[tuple[str, int, int], EncodedImage] | None = None

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings | None = None
    ) -> list[Image.Image]:
        """Samples one image per prompt, with initial noise from its own seed, whatever else is in the batch.

        UserError if prompts and seeds differ in number, the sampler cannot take so many steps, or the model's outputs
        are not finite.
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
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = None if settings.start is None else self._start_latents(settings.start, generators, settings)
        noise = self._noise(generators, settings)
        with attention_kernels(self._networks.speed):
            latents = self._denoise(prompts, noise, settings, latents)
        return self._decode(latents)

    def _noise(self, generators: Sequence[torch.Generator], settings: SampleSettings) -> torch.Tensor:
        shape = (LATENT_CHANNELS, *self._latent_shape(settings))
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self._device)

    def _latent_shape(self, settings: SampleSettings) -> tuple[int, int]:
        """Height and width of the latents."""
        size = self._networks.latent_size
        height, width = latent_shape(size)
        pixels = _pixels_per_latent(self._networks.vae)
        return (settings.height or height * pixels) // pixels, (settings.width or width * pixels) // pixels

    def _start_latents(
        self, start: StartImage, generators: Sequence[torch.Generator], settings: SampleSettings
    ) -> torch.Tensor:
        """Latents of the start image, (B, 4, h, w), each a sample of the posterior by its own generator, scaled."""
        vae, (height, width) = self._networks.vae, self._latent_shape(settings)
        key = (start.digest, height, width)
        if self._encoded is None or self._encoded[0] != key:
            pixels = _pixels_per_latent(vae)
            self._encoded = key, encode_image(vae, start.pixels(width * pixels, height * pixels))
        return self._encoded[1].sample(generators) * vae.config.scaling_factor

    def _denoise(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        settings: SampleSettings,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        strength = 1.0 if settings.start is None else settings.start.strength
        config = self._networks.scheduler_config
        scheduler, timesteps = begin_steps(settings.sampler, config, settings.num_steps, strength)
        latents = noise
        if start is not None:
            signal = float(scheduler.alphas_cumprod[timesteps[0]])  # on the host, where the sampler's steps need it
            latents = math.sqrt(signal) * start + math.sqrt(1 - signal) * noise
        guided = settings.guidance_scale != 1.0
        context = self._encode(prompts)
        if guided:
            context = torch.cat([self._encode([settings.negative_prompt]).expand_as(context), context])
        # On the device at once: copies in the loop would make the host wait.
        at_host = torch.tensor(timesteps)
        for timestep, at in zip(at_host, at_host.to(self._device), strict=True):
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
        return decode_latents(self._networks.vae, latents, self._networks.source)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, source: str) -> list[Image.Image]:
    """The images of scaled latents, (B, 4, h, w); UserError, naming `source`, if the VAE gives no finite ones."""
    images = list[Image.Image]()
    for part in latents.split(_DECODED_AT_ONCE):
        pixels = vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        if not pixels.isfinite().all():
            raise UserError(f"The VAE of {source} gives images that are not finite; its weights are damaged.")
        rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(image) for image in rounded]
    return images


def _pixels_per_latent(vae: AutoencoderKL) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


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
