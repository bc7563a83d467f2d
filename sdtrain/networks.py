"""The networks that make pictures, loaded from a diffusers folder or from a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.errors import UserError
from sdtrain.export import load_unet
from sdtrain.model import load_text_encoder, load_vae, prepare_for
from sdtrain.samplers import sampling_scheduler

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Networks:
    """What a picture is made with.

    Attributes:
        unet: the noise predictor: (latents, timesteps, context) -> an output whose `sample` is the prediction.
        vae: float32.
        tokenizer, text_encoder: CLIP's; the encoder in the UNet's dtype.
        scheduler_config: of a diffusers scheduler.
        latent_size: height and width of the latents.
        dtype: of the UNet's inputs; the sampler's steps and the VAE are float32.
        source: where the weights are from, for messages.
    """

    unet: Callable[..., Any]
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    scheduler_config: Mapping[str, Any]
    latent_size: int
    dtype: torch.dtype
    source: str


def load_networks(
    path: Path | str, device: str | None = None, dtype: torch.dtype = torch.bfloat16, weights: Weights = "ema"
) -> Networks:
    """The networks of a model.

    Args:
        path: a diffusers folder, such as `export_diffusers` writes; or a training run (its newest checkpoint) or one
            of its checkpoints.
        device: where to run; CUDA if there is one, by default.
        dtype: of UNet and text encoder.
        weights: averaged or raw ones; a diffusers folder has one kind only.

    Raises:
        UserError: there is no such model.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parts = _parts_of_run(Path(path), weights) if is_run(Path(path)) else _parts_of_folder(Path(path), weights, dtype)
    unet, vae, text, scheduler_config = parts
    tokenizer, text_encoder = load_text_encoder(text)
    return Networks(
        unet=prepare_for(_cast(unet, dtype), place).requires_grad_(False).eval(),
        vae=load_vae(vae).to(place),
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(place, dtype),
        scheduler_config=scheduler_config,
        latent_size=unet.config.sample_size,
        dtype=dtype,
        source=str(path),
    )


def _cast(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns of what it would keep in float32: nothing here
    return unet


def is_run(path: Path) -> bool:
    """Whether a folder is a training run or one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "layout.json").exists()


# UNet, where VAE and text encoder are from, config of the scheduler.
_Parts = tuple[UNet2DConditionModel, str, str, Mapping[str, Any]]


def _parts_of_run(run: Path, weights: Weights) -> _Parts:
    unet, config = load_unet(run, weights)
    return unet, config.vae, config.text_encoder, sampling_scheduler(config.diffusion).config


def _parts_of_folder(folder: Path, weights: Weights, dtype: torch.dtype) -> _Parts:
    if weights != "ema":
        raise UserError(f"{folder} is no training run, so there are no raw weights to choose. Leave --weights out.")
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True)
        scheduler_config = PNDMScheduler.load_config(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is neither a diffusers folder with a Stable Diffusion pipeline nor a training run: {error}"
        ) from error
    return unet, str(folder), str(folder), scheduler_config
