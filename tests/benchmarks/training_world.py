"""What the training benchmark trains: networks with random weights, random latents, and the settings around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.config import TrainConfig, load_config
from sdtrain.settings import parse_settings
from tests.training_fixtures import write_latents, write_models

NUM_SAMPLES, SAMPLES_PER_SHARD = 2048, 512

MID = {
    "name": "mid",
    "unet": {
        "block_out_channels": [128, 256, 384],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 256,
    },
    "data": {"resolution": 128},
    "micro_batch_size": 4,
    "steps": 1,
}
"""A UNet of 50,349,060 parameters, for machines without a GPU."""


def settings_of(name: str, resolution: int | None) -> dict[str, Any]:
    """Settings by the name of a config, the name of a YAML file, or `mid`."""
    content = parse_settings(TrainConfig, MID, name).model_dump() if name == "mid" else load_config(name).model_dump()
    if resolution is not None:
        content["data"]["resolution"] = resolution
    return content


def endless(content: dict[str, Any], log_every: int) -> dict[str, Any]:
    """Settings of a run that only a clock ends, and that writes no checkpoint."""
    return content | {"steps": 10**6, "log_every": log_every, "checkpoint": {"every": 10**6}}


def write_world(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Puts networks and latents into `folder`, if they are not there; returns settings that use them.

    The text encoder has the size that goes with the UNet: CLIP ViT-L/14's for SD v1. The VAE is only asked for its
    digest and its scale, so it is a small one.
    """
    models, data = folder / "models", folder / "data"
    if not data.exists():
        write_models(models)
        width = content["unet"]["cross_attention_dim"]
        if width != 64:  # the fixture's own
            _write_text_encoder(models / "text_encoder", width)
            tokenizer = CLIPTokenizer.from_pretrained(models / "tokenizer", model_max_length=77)
            tokenizer.save_pretrained(models / "tokenizer")
        write_latents(data, models, NUM_SAMPLES, SAMPLES_PER_SHARD, content["data"]["resolution"] // 8)
    return content | {
        "vae": str(models),
        "text_encoder": str(models),
        "data": content["data"] | {"root": str(data)},
        "init_from": None,
    }


def _write_text_encoder(folder: Path, width: int) -> None:
    config = CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    CLIPTextModel(config).save_pretrained(folder)


def write_settings(path: Path, content: dict[str, Any]) -> TrainConfig:
    """The settings, checked, and written as a YAML file for other processes."""
    config = parse_settings(TrainConfig, content, path.name)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config
