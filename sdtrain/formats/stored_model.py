"""Represents a model as a run, a folder or a file holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.errors import UserError
from sdtrain.options import Weights

State = dict[str, torch.Tensor]
TRAINED_PX = "_trained_px"
"""Key of a UNet's config in runs and exports: sizes of the training images. Diffusers ignores a name like this."""
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class FrozenModels:
    """The networks that training freezes, in fp32."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel


@dataclass(frozen=True)
class Average:
    """The averaged weights' decay and number of updates."""

    decay: float
    num_updates: int | None
    """None if not counted; CompVis' files then say -1."""


@dataclass(frozen=True)
class StoredModel:
    """A model, whose large parts are read on access.

    Attributes:
        source: its location, for messages.
        unet_config: in diffusers' terms.
        scheduler_config: of a diffusers scheduler.
        states: the UNet's tensors by diffusers' names, for each kind of weights; the only kind is `ema`.
        frozen: loads the other networks.
        average: of the averaged weights, if known.
        step: optimizer steps trained, 0 if unknown.
        tokenizer_name: hub id or `demo`, if the tokenizer has one.
        tokenizer: loads the tokenizer alone, which takes no time beside the other networks.
    """

    source: str
    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    states: Mapping[Weights, Callable[[], State]]
    frozen: Callable[[], FrozenModels]
    average: Average | None = None
    step: int = 0
    tokenizer_name: str | None = None
    tokenizer: Callable[[], CLIPTokenizer] | None = None

    @property
    def trained_px(self) -> list[tuple[int, int]]:
        """Widths and heights of the training images, if they are recorded."""
        return [(width, height) for width, height in self.unet_config.get(TRAINED_PX, ())]

    def state(self, weights: Weights) -> State:
        """The UNet's tensors by diffusers' names, in their stored dtype; UserError if damaged or no raw weights."""
        if weights not in self.states:
            raise UserError(f"{self.source} has one kind of weights, so there are no raw weights to choose; take ema.")
        return self.states[weights]()

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """The UNet with these weights in fp32, as a file may mix dtypes, in which no network can compute.

        UserError as for `state`, or if the weights do not fit the UNet's config.
        """
        state = {name: tensor.float() for name, tensor in self.state(weights).items()}
        unet = empty_unet(self.unet_config)
        try:
            unet.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"The weights of {self.source} do not fit the UNet of its config.") from error
        return unet.requires_grad_(False).eval()


def with_trained_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's config whose `sample_size` is its training size where that is recorded, whatever stands there."""
    sizes = [(height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT) for width, height in config.get(TRAINED_PX, ())]
    if not sizes or latent_shape(config["sample_size"]) in sizes:
        return dict(config)
    height, width = sizes[0]
    return {**config, "sample_size": height if height == width else [height, width]}


def latent_shape(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of the latents, from a UNet's `sample_size`: a side, or both."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return int(height), int(width)


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet with shapes but no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE with shapes but no memory."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor on the host, rounded to `dtype`; UserError if fp16 would make its numbers infinite."""
    result = tensor.detach().to("cpu", dtype)
    if dtype is torch.float16 and not torch.isfinite(result).all():
        raise UserError(f"{name} has numbers that fp16 cannot hold (beyond 65504, or not finite). Export bf16 or fp32.")
    return result
