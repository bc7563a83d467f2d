"""What the tensors of a CompVis file are arranged as, and whether they are what a file holds."""

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
from sdtrain.formats.compvis_names import TEXT, UNET, VAE, renamed, text_names, unet_modules, vae_modules
from sdtrain.formats.published import TEXT_CONFIG, VAE_CONFIG
from sdtrain.formats.stored_model import empty_unet, empty_vae
from sdtrain.models.build import build_unet
from sdtrain.models.schedulers import sampling_scheduler

_TELLTALE = {
    "conditioner.": "is a Stable Diffusion XL",
    "cond_stage_model.model.": "is a Stable Diffusion 2",
    "joint_blocks.": "is a Stable Diffusion 3",
    "double_blocks.": "is a FLUX model",
    "lora_": "holds only low-rank changes (LoRA) of a model",
    "down_blocks.": "holds one network of a diffusers folder; name the folder, not the file in it",
}
# Left in some files by other tools; no network of SD v1 has them.
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
    """Configs of a model's parts, in the words of diffusers and transformers."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: str | None = "openai/clip-vit-large-patch14"

    def to_json(self) -> str:
        """As one text, without what only says where the parts were loaded from."""
        return json.dumps({name: _public(value) for name, value in asdict(self).items()}, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str) -> Architecture:
        """Reads what `to_json` wrote.

        Raises:
            UserError: it is something else; `where` names the file.
        """
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
        """The VAE's."""
        return renamed(empty_vae(self.vae).state_dict(), vae_modules(self.vae), VAE)

    @cached_property
    def text_names(self) -> dict[str, str]:
        """The text encoder's: name in this version of transformers -> name in a file."""
        with torch.device("meta"):
            return text_names(CLIPTextModel(CLIPTextConfig.from_dict(dict(self.text_encoder))).state_dict())

    def require(self, names: Collection[str], where: str) -> None:
        """Checks that a file's tensors are this model's, all of them and no others.

        Args:
            names: as CompVis writes them; see `spellings.compvis_name`.
            where: names the file.

        Raises:
            UserError: they are those of another model; names the first tensor that shows it, and says which model it
                is, where that can be seen.
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
    """The model that public files without notes hold: configs/stable-diffusion/v1-inference.yaml of CompVis."""
    with torch.device("meta"):
        unet = build_unet(UNetConfig(), latent_size=64)
    return Architecture(dict(unet.config), VAE_CONFIG, TEXT_CONFIG, dict(sampling_scheduler(DiffusionConfig()).config))
