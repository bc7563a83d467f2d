"""CLIP models by open_clip: weights, tokenizer, and how they want their images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import open_clip

from sdtrain.errors import UserError
from sdtrain.models.clip_view import Preprocess
from sdtrain.models.weights import find_weights, random_seed, seeded

_CLIP_MODELS = Path(__file__).parent / "clip_models"


def load_clip(model: str, weights: str) -> tuple[Any, Any]:
    """An open_clip model in eval mode, and its tokenizer.

    Raises:
        UserError: unknown model or weights, or weights trained with QuickGELU (OpenAI's) in a model without it.
    """
    config = _config(model)
    known = open_clip.get_pretrained_cfg(model, weights)
    if known.get("quick_gelu") and not config.get("quick_gelu"):
        raise UserError(f"The weights '{weights}' need QuickGELU: set clip_model to {model}-quickgelu.")
    seed = random_seed(weights)
    source = None if seed is not None else weights if known else _readable(find_weights(weights, {}))
    try:
        with seeded(seed):
            network = open_clip.create_model(model, pretrained=source)
        return network.eval(), open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"CLIP {model} with weights '{weights}' cannot be loaded ({error}). Without a connection, set "
            "clip_weights to a file, or do without the CLIP scores."
        ) from error


def _readable(path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise UserError(
                    f"{path} is a program for TorchScript, as OpenAI published CLIP, and to read it could run "
                    "someone's code. Take open_clip_model.safetensors; for ViT-L-14-quickgelu it lies on the hub in "
                    "timm/vit_large_patch14_clip_224.openai and has the same weights."
                )
    return str(path)


def embedding_size(model: str) -> int:
    """How many numbers the model's embeddings have.

    Raises:
        UserError: open_clip does not know the model.
    """
    return int(_config(model)["embed_dim"])


def clip_preprocess(network: Any, model: str, weights: str) -> Preprocess:
    """How the model was shown images when it was trained.

    Published weights say so themselves. For a file, all published weights of the same model are asked; where there are
    none, or where they differ, it is taken for OpenAI's way.

    Raises:
        UserError: it is a way that we do not have.
    """
    wanted = dict(network.visual.preprocess_cfg)
    if not open_clip.get_pretrained_cfg(model, weights):
        ways = [open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)]
        names = ("mean", "std", "interpolation", "resize_mode")
        alike = {tuple(way.get(name) for name in names) for way in ways}
        wanted |= dict(zip(names, alike.pop(), strict=True)) if len(alike) == 1 else {}
    sides = wanted["size"] if isinstance(wanted["size"], tuple | list) else (wanted["size"],)
    squash = wanted["resize_mode"] == "squash"
    if len(set(sides)) != 1 or wanted["resize_mode"] not in ("shortest", "squash"):
        raise UserError(
            f"clip_model: {model} wants images of {wanted['size']} pixels by '{wanted['resize_mode']}'; only "
            "squares by 'shortest' or 'squash' are made here. Choose another model."
        )
    return Preprocess(int(sides[0]), tuple(wanted["mean"]), tuple(wanted["std"]), wanted["interpolation"], squash)


def _config(model: str) -> dict[str, Any]:
    open_clip.add_model_config(_CLIP_MODELS)
    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"clip_model: open_clip knows no model '{model}'. Try ViT-L-14-quickgelu.")
    return config
