"""Derives the architecture of a model in a CompVis file and checks that the file holds its tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sdtrain.config import DiffusionConfig
from sdtrain.config.sections import UNetConfig
from sdtrain.errors import UserError
from sdtrain.formats.names import TEXT, UNET, VAE, renamed, text_names, unet_modules, vae_modules
from sdtrain.formats.stored_model import empty_unet, empty_vae
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.models.unet import build_unet

SCALING_FACTOR = 0.18215
"""Diffusers' default, for VAE configs that name none, such as those of 2022."""
VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": SCALING_FACTOR,
}
TEXT_CONFIG: Mapping[str, Any] = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
}
_TELLTALE = {
    "conditioner.": "is a Stable Diffusion XL",
    "cond_stage_model.model.": "is a Stable Diffusion 2",
    "joint_blocks.": "is a Stable Diffusion 3",
    "double_blocks.": "is a FLUX model",
    "lora_": "holds only low-rank changes (LoRA) of a model",
    "down_blocks.": "holds one network of a diffusers folder; name the folder, not the file in it",
}
# Left in some files by other tools; no SD v1 network uses them.
_SUPERFLUOUS = (
    TEXT + "embeddings.position_ids",
    TEXT + "text_projection",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    *("cond_stage_model." + name for name in ("logit_scale", "text_projection", "transformer.logit_scale")),
    *("cond_stage_model.transformer." + name for name in ("text_projection", "vision_model.", "visual_projection")),
)


@dataclass(frozen=True)
class Architecture:
    """Configs of a model's parts, in the terms of diffusers and transformers."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: str | None = "openai/clip-vit-large-patch14"

    def to_json(self) -> str:
        """Serialises the configs, leaving out where the parts were loaded from."""
        return json.dumps({name: _public(value) for name, value in asdict(self).items()}, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str) -> Architecture:
        """Reads what `to_json` wrote; UserError, naming `where`, for anything else."""
        try:
            return Architecture(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where} has notes of sdtrain that cannot be read: {error}") from error

    @cached_property
    def unet_shapes(self) -> dict[str, tuple[int, ...]]:
        """The UNet's tensors by diffusers' names."""
        return {name: tuple(tensor.shape) for name, tensor in empty_unet(self.unet).state_dict().items()}

    @cached_property
    def unet_names(self) -> dict[str, str]:
        """The UNet's tensors: diffusers' name -> name in a file."""
        return renamed(self.unet_shapes, unet_modules(self.unet), UNET)

    @cached_property
    def vae_names(self) -> dict[str, str]:
        """The VAE's tensors: diffusers' name -> name in a file."""
        return renamed(empty_vae(self.vae).state_dict(), vae_modules(self.vae), VAE)

    @cached_property
    def text_names(self) -> dict[str, str]:
        """The text encoder's tensors: name in this version of transformers -> name in a file."""
        with torch.device("meta"):
            return text_names(CLIPTextModel(CLIPTextConfig.from_dict(dict(self.text_encoder))).state_dict())

    def require(self, names: Collection[str], where: str) -> None:
        """Checks that a file, named `where`, holds this model's tensors, all of them and no others.

        `names` are in CompVis' spelling; see `names.compvis_name`. UserError for another model's tensors names the
        first one that differs and, if recognised, the model.
        """
        wanted = {name for part in (self.unet_names, self.vae_names, self.text_names) for name in part.values()}
        found = {name for name in names if name.startswith((UNET, VAE, "cond_stage_model."))}
        missing = sorted(wanted - found)
        unexpected = sorted(name for name in found - wanted if not name.startswith(_SUPERFLUOUS))
        if not missing and not unexpected:
            return
        for part, description in _TELLTALE.items():
            telling = min((name for name in names if part in name), default=None)
            if telling:
                raise UserError(f"{where} {description}, not a Stable Diffusion v1 in one file: it holds {telling}.")
        example = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unknown"
        raise UserError(
            f"{where} is not a Stable Diffusion v1 in one file: of {len(wanted)} tensors {len(missing)} are missing, "
            f"and {len(unexpected)} are unknown; {example}."
        )


def _public(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {name: value for name, value in config.items() if name != "_name_or_path" and name != "_use_default_values"}


def sd_v1() -> Architecture:
    """The model in public files without notes: CompVis' configs/stable-diffusion/v1-inference.yaml."""
    with torch.device("meta"):
        unet = build_unet(UNetConfig(), latent_size=64)
    return Architecture(dict(unet.config), VAE_CONFIG, TEXT_CONFIG, dict(sampling_scheduler(DiffusionConfig()).config))
