"""Opens any model that sdtrain can read: a training run, a diffusers folder or a CompVis file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel

from sdtrain.config import TrainConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.formats.compvis import open_compvis
from sdtrain.formats.fitting import fit
from sdtrain.formats.frozen import load_frozen, load_tokenizer
from sdtrain.formats.part_files import find_part, open_part
from sdtrain.formats.stored_model import (
    TRAINED_PX,
    Average,
    State,
    StoredModel,
    Weights,
    empty_unet,
    with_trained_size,
)
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.models.unet import build_unet
from sdtrain.settings import load_settings

RAW_VARIANT = "non_ema"
"""The variant under which public diffusers folders hold raw weights beside the averaged ones."""


def is_run(path: Path) -> bool:
    """Whether a folder is a training run or one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "layout.json").exists()


def resolve_checkpoint(path: Path) -> Path:
    """A run's newest checkpoint, fixed even if training goes on; other paths unchanged.

    UserError for a run without a checkpoint.
    """
    return find_checkpoint(path).path if is_run(path) else path


def open_model(path: Path | str, tokenizer: str | None = None, verify: bool = True) -> StoredModel:
    """Opens the model at `path`; UserError if there is none.

    Args:
        path: a training run (its newest checkpoint), one of its checkpoints, a diffusers folder or a CompVis file.
        tokenizer: for a CompVis file, which holds none: a folder, a hub id or `demo`; by default CLIP's.
        verify: compares a checkpoint's files with their digests, for which they are read whole.
    """
    path = Path(path)
    if path.is_file():
        return open_compvis(path, tokenizer)
    return open_run(path, verify) if is_run(path) else open_folder(path)


def open_run(path: Path, verify: bool = True) -> StoredModel:
    """A run's newest checkpoint, or a checkpoint, without DeepSpeed; UserError if missing or damaged."""
    checkpoint = find_checkpoint(path)
    if verify:
        checkpoint.verify()
    config = load_settings(TrainConfig, checkpoint.path.parents[1] / "config.yaml")
    name, step = config.text_encoder, checkpoint.layout.step
    return StoredModel(
        source=str(checkpoint.path),
        unet_config={**_unet_config(config), TRAINED_PX: trained_sizes(config)},
        scheduler_config=sampling_scheduler(config.diffusion).config,
        states={"ema": lambda: dict(checkpoint.weights("ema")), "raw": lambda: dict(checkpoint.weights("master"))},
        frozen=lambda: load_frozen(config.vae, name),
        average=Average(config.ema.decay, checkpoint.layout.ema_updates),
        step=step,
        tokenizer_name=None if Path(name).is_dir() else name,
        tokenizer=lambda: load_tokenizer(name),
    )


def trained_sizes(config: TrainConfig) -> list[list[int]]:
    """Widths and heights of a run's images: one square, or the buckets of its latents as far as these are at hand."""
    side_px, sizes = config.data.resolution, list[list[int]]()
    for source in config.data.all_sources if config.data.bucket_group else ():
        with suppress(OSError, ValueError):
            sizes += json.loads(DatasetDir(Path(source.root)).latents_info.read_text()).get("buckets", [])
    return sizes or [[side_px, side_px]]


def _unet_config(config: TrainConfig) -> Mapping[str, Any]:
    with torch.device("meta"):
        return dict(build_unet(config.unet, config.latent_size).config)


def open_folder(path: Path) -> StoredModel:
    """The model in a diffusers folder, with raw weights if the folder has them; UserError if it is no such folder."""
    unet_folder = path / "unet"
    try:
        unet_config = UNet2DConditionModel.load_config(unet_folder, local_files_only=True)
        scheduler_config = PNDMScheduler.load_config(path / "scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is neither a diffusers folder with a Stable Diffusion pipeline nor a training run: {error}"
        ) from error
    # Missing in the configs of 2022; these are the values their models were trained with, and diffusers' pipeline also
    # adds them.
    unet_config = dict(unet_config)
    if unet_config.get("sample_size") is None:
        unet_config["sample_size"] = 64
    unet_config = with_trained_size(unet_config)
    scheduler_config = {"steps_offset": 1, "set_alpha_to_one": False, **scheduler_config}
    states: dict[Weights, Any] = {"ema": lambda: _folder_state(unet_folder, unet_config, None)}
    if find_part(unet_folder, "unet", RAW_VARIANT):
        states["raw"] = lambda: _folder_state(unet_folder, unet_config, RAW_VARIANT)
    return StoredModel(
        source=str(path),
        unet_config=unet_config,
        scheduler_config=scheduler_config,
        states=states,
        frozen=lambda: load_frozen(str(path), str(path)),
        tokenizer=lambda: load_tokenizer(str(path)),
    )


def _folder_state(folder: Path, config: Mapping[str, Any], variant: str | None) -> State:
    try:
        tensors = fit(open_part(folder, "unet", variant), empty_unet(config), str, str(folder))
        return {name: tensor.float() for name, tensor in tensors.items()}
    except UserError as error:
        raise UserError(f"{folder} is not a UNet that diffusers can load: {error}") from error


def training_weights(path: Path) -> tuple[State, State, int | None]:
    """The UNet's raw and averaged weights to start training from, and the number of updates behind the average.

    A model with one kind of weights gives it as both, with 0 updates. The number is None for an average whose updates
    were not counted. UserError if there is no such model.
    """
    model = open_model(path)
    weights = model.state("ema")
    if "raw" not in model.states:
        return weights, weights, 0
    return model.state("raw"), weights, None if model.average is None else model.average.num_updates
