"""A model as a run, a folder or a file holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.choices import Weights
from sdtrain.errors import UserError

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FrozenModels:
    """The networks that training leaves as they are; all in fp32."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel


@dataclass(frozen=True)
class Average:
    """How the averaged weights came to be."""

    decay: float
    num_updates: int | None
    """None where they were not counted; CompVis' files then say -1."""


@dataclass(frozen=True)
class StoredModel:
    """A model; nothing large is read before it is asked for.

    Attributes:
        source: where it is, for messages.
        unet_config: in diffusers' words.
        scheduler_config: of a diffusers scheduler.
        states: the UNet's tensors by diffusers' names, of each kind there is; where there is one only, it is `ema`.
        frozen: loads the other networks.
        average: of the averaged weights, where it is known.
        step: optimizer steps that were trained, 0 where it is not known.
        tokenizer_name: hub id or `demo`, where the tokenizer has such a name.
    """

    source: str
    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    states: Mapping[Weights, Callable[[], State]]
    frozen: Callable[[], FrozenModels]
    average: Average | None = None
    step: int = 0
    tokenizer_name: str | None = None

    def state(self, weights: Weights) -> State:
        """The UNet's tensors by diffusers' names, in the dtype in which they are stored.

        Raises:
            UserError: the model has no raw weights beside the others; damaged files.
        """
        if weights not in self.states:
            raise UserError(f"{self.source} has one kind of weights, so there are no raw weights to choose; take ema.")
        return self.states[weights]()

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """The UNet with these weights, in fp32: a file may have several dtypes, in which no network computes.

        Raises:
            UserError: as `state`; or the weights do not fit the UNet's config.
        """
        state = {name: tensor.float() for name, tensor in self.state(weights).items()}
        unet = empty_unet(self.unet_config)
        try:
            unet.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"The weights of {self.source} do not fit the UNet of its config.") from error
        return unet.requires_grad_(False).eval()


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet whose parameters have shapes but no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE whose parameters have shapes but no memory."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor on the host, rounded to `dtype`.

    Raises:
        UserError: fp16 cannot hold its numbers, which would become infinite.
    """
    result = tensor.detach().to("cpu", dtype)
    if dtype is torch.float16 and not torch.isfinite(result).all():
        raise UserError(f"{name} has numbers that fp16 cannot hold (beyond 65504, or not finite). Export bf16 or fp32.")
    return result
