"""From a checkpoint to a folder that `StableDiffusionPipeline.from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sdtrain.checkpoint import find_checkpoint
from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.model import build_unet, load_text_encoder, load_vae
from sdtrain.samplers import sampling_scheduler
from sdtrain.settings import load_settings

_STATE_NAMES = {"ema": "ema", "raw": "master"}


def load_unet(source: Path, weights: Literal["ema", "raw"] = "ema") -> tuple[UNet2DConditionModel, TrainConfig]:
    """The UNet in fp32 as a run trained it, without DeepSpeed, and the run's config.

    Args:
        source: a run directory (its newest checkpoint) or a checkpoint.
        weights: averaged or raw ones.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of another network than the config's.
    """
    checkpoint = find_checkpoint(source)
    checkpoint.verify()
    config = load_settings(TrainConfig, checkpoint.path.parents[1] / "config.yaml")
    unet = build_unet(config.unet, config.latent_size)
    missing, unexpected = unet.load_state_dict(dict(checkpoint.weights(_STATE_NAMES[weights])), strict=False)
    if missing or unexpected:
        raise UserError(f"{checkpoint.path} does not fit the UNet of {checkpoint.path.parents[1] / 'config.yaml'}.")
    return unet, config


def export_diffusers(source: Path, output: Path, ema: bool = True) -> Path:
    """Writes UNet, VAE, text encoder, tokenizer and scheduler as a diffusers folder.

    Args:
        source: a run directory (its newest checkpoint) or a checkpoint.
        output: the folder; an earlier export there is replaced.
        ema: averaged weights, or raw ones.

    Raises:
        UserError: no checkpoint, or `output` holds something else.
    """
    unet, config = load_unet(source, "ema" if ema else "raw")
    return write_pipeline(unet, config, output)


def write_pipeline(unet: UNet2DConditionModel, config: TrainConfig, output: Path) -> Path:
    """Writes `unet` with the config's frozen networks as a diffusers folder, whole or not at all.

    Raises:
        UserError: `output` holds something that is no earlier export.
    """
    tokenizer, text_encoder = load_text_encoder(config.text_encoder)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(config.vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampling_scheduler(config.diffusion),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with _publish_folder(output) as temporary:
        pipeline.save_pretrained(temporary)
    return output


@contextmanager
def _publish_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder and puts it in the place of `target` when the block ends well."""
    if target.exists() and not (target / "model_index.json").exists():
        raise UserError(f"{target} exists and is not an earlier export; choose another output.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        yield temporary
        if target.exists():
            target.replace(replaced)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
