"""From prompts to pictures: PLMS with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError

from sdtrain.data.loader import tokenize
from sdtrain.diffusion import guide
from sdtrain.errors import UserError
from sdtrain.model import LATENT_CHANNELS, load_text_encoder, load_vae, prepare_for


class Sampler:
    """Samples from a diffusers folder, such as `export_diffusers` writes.

    Args:
        folder: with unet, vae, text_encoder, tokenizer and scheduler.
        device: where to run; CUDA if there is one, by default.
        dtype: of UNet and text encoder; PLMS steps and the VAE are float32.

    Raises:
        UserError: the folder is not such a pipeline.
    """

    def __init__(self, folder: Path | str, device: str | None = None, dtype: torch.dtype = torch.bfloat16):
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype, self._folder = dtype, Path(folder)
        try:
            unet = UNet2DConditionModel.from_pretrained(self._folder / "unet", torch_dtype=dtype, local_files_only=True)
            self._scheduler_config = PNDMScheduler.load_config(self._folder / "scheduler", local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} is not a diffusers folder with a Stable Diffusion pipeline: {error}") from error
        self._unet = prepare_for(unet, self._device).requires_grad_(False).eval()
        self._tokenizer, text_encoder = load_text_encoder(str(folder))
        self._text_encoder = text_encoder.to(self._device, dtype)
        self._vae = load_vae(str(folder)).to(self._device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float = 7.5,
        num_steps: int = 50,
        batch_size: int = 16,
    ) -> list[Image.Image]:
        """One picture for each prompt and its seed.

        A picture's initial noise comes from its own seed, whatever else is in its batch.

        Args:
            prompts: captions.
            seeds: one for each prompt.
            guidance_scale: 1 is no guidance, and skips the unconditional half.
            num_steps: PLMS steps; the UNet is called once more than that.
            batch_size: pictures at once.

        Raises:
            UserError: prompts and seeds differ in number, a bad setting, or a model that gives no finite numbers.
        """
        if len(prompts) != len(seeds):
            raise UserError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt.")
        if num_steps < 1 or batch_size < 1:
            raise UserError(f"num_steps ({num_steps}) and batch_size ({batch_size}) must be at least 1.")
        pictures: list[Image.Image] = []
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            latents = self._denoise(prompts[part], self._initial_noise(seeds[part]), guidance_scale, num_steps)
            pictures += self._decode(latents)
        return pictures

    def _initial_noise(self, seeds: Sequence[int]) -> torch.Tensor:
        size = self._unet.config.sample_size
        shape = (LATENT_CHANNELS, size, size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self._device)

    def _denoise(self, prompts: Sequence[str], latents: torch.Tensor, scale: float, num_steps: int) -> torch.Tensor:
        scheduler = PNDMScheduler.from_config(self._scheduler_config)
        scheduler.set_timesteps(num_steps)
        guided = scale != 1.0
        context = self._encode([*[""] * len(prompts), *prompts] if guided else prompts)
        for timestep in scheduler.timesteps:
            inputs = torch.cat([latents, latents]) if guided else latents
            predicted = self._unet(inputs.to(self._dtype), timestep, context).sample.float()
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = guide(unconditional, conditional, scale)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        if not torch.isfinite(latents).all():
            raise UserError(
                f"The model in {self._folder} gives numbers that are not finite, so there is no picture. "
                "Export an earlier checkpoint."
            )
        return latents

    def _encode(self, captions: Sequence[str]) -> torch.Tensor:
        token_ids = tokenize(self._tokenizer, captions).to(self._device)
        return self._text_encoder(token_ids).last_hidden_state

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        pixels = self._vae.decode(latents / self._vae.config.scaling_factor).sample
        rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in rounded]


def make_grid(pictures: Sequence[Image.Image], columns: int | None = None, gap_px: int = 2) -> Image.Image:
    """Pictures of one size on a white sheet, row by row; nearly square by default.

    Raises:
        UserError: no pictures.
    """
    if not pictures:
        raise UserError("There are no pictures to put on a sheet.")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].width + gap_px, pictures[0].height + gap_px
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width + gap_px, rows * height + gap_px), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (gap_px + column * width, gap_px + row * height))
    return sheet
