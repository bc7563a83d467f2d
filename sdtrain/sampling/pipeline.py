"""Loads the networks that make images, from a run, a diffusers folder or a CompVis file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.choices import Weights
from sdtrain.config.sections import SpeedConfig
from sdtrain.formats.any_model import open_model
from sdtrain.models.backends import compile_unet, set_backends
from sdtrain.models.unet import prepare_for
from sdtrain.precision import fast_dtype


@dataclass(frozen=True)
class Networks:
    """The networks of a text-to-image pipeline.

    `unet` maps latents, timesteps and context to an output whose `sample` is the prediction. It and the text encoder
    compute in `dtype`; the sampler's steps and the VAE are float32. `source` names the weights' origin in messages.
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


def load_networks(
    path: Path | str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights = "ema",
    speed: SpeedConfig | None = None,
    tokenizer: str | None = None,
) -> Networks:
    """Loads the networks of a model.

    Args:
        path: a training run (its newest checkpoint), one of its checkpoints, a diffusers folder, or a CompVis file.
        device: by default CUDA, if available.
        dtype: of UNet and text encoder; by default the device's fast one, as with `precision: auto`.
        weights: averaged or raw; a published model mostly has one kind, which counts as averaged.
        speed: attention kernel, memory layout, compilation.
        tokenizer: for a CompVis file, which holds none: a folder, a hub id or `demo`; by default CLIP's.

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
        vae=frozen.vae.to(place),
        tokenizer=frozen.tokenizer,
        text_encoder=frozen.text_encoder.to(place, dtype),
        scheduler_config=model.scheduler_config,
        latent_size=unet.config.sample_size,
        dtype=dtype,
        source=str(path),
        speed=speed,
    )
