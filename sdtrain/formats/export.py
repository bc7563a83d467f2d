"""Exports any model that sdtrain can read as a diffusers folder or a CompVis file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import raise_if_disk_full
from sdtrain.errors import UserError
from sdtrain.formats.any_model import RAW_VARIANT, is_run, open_model, trained_sizes
from sdtrain.formats.compvis import write_compvis
from sdtrain.formats.frozen import load_frozen
from sdtrain.formats.post_hoc import reconstruct
from sdtrain.formats.stored_model import TRAINED_PX, FrozenModels, StoredModel, Weights, cast
from sdtrain.formats.tensor_file import SUFFIXES
from sdtrain.models.schedulers import make_scheduler, sampling_scheduler
from sdtrain.precision import Fixed, torch_dtype

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class ExportSettings:
    """Which weights to write, and in which form.

    `weights` are averaged, raw or `both`: then a CompVis file holds the averaged ones as `model_ema.*`, and a diffusers
    folder the raw ones as variant `non_ema`, as in public files and folders. `tokenizer`, for a model in one file,
    which holds none, is a folder, a hub id or `demo`; by default CLIP's. `ema_length` takes, as averaged ones, the
    average of that length, reconstructed from a run's snapshots (`sdtrain.formats.post_hoc`).
    """

    weights: Literal["ema", "raw", "both"] = "ema"
    dtype: Fixed = "fp32"
    tokenizer: str | None = None
    ema_length: float | None = None


def export_model(source: Path, output: Path, settings: ExportSettings | None = None) -> Path:
    """Writes a model as a CompVis file or as a diffusers folder, whole or not at all.

    Args:
        source: a run (its newest checkpoint), a checkpoint, a diffusers folder or a CompVis file.
        output: a `.ckpt` or `.safetensors` file, which is replaced, or a folder, replaced only if it is an export.
        settings: which weights, in which precision.

    Raises:
        UserError: no such model or weights; `output` holds something else; the disk is full.
    """
    settings = settings or ExportSettings()
    if output.suffix not in SUFFIXES:
        _require_replaceable(output)
    elif output.is_dir():
        raise UserError(f"{output} is a folder; choose another name for the file.")
    model = open_model(source, settings.tokenizer)
    if settings.ema_length is not None:
        model = _with_average(model, source, settings)
    if output.suffix in SUFFIXES:
        _export_compvis(model, output, settings)
    else:
        _export_diffusers(model, output, settings)
    return output


def _with_average(model: StoredModel, source: Path, settings: ExportSettings) -> StoredModel:
    """The model with the reconstructed average in the place of its own."""
    if settings.weights == "raw" or settings.ema_length is None:
        raise UserError("The length of an average says nothing about raw weights. Leave --weights or --ema-length out.")
    if not is_run(source):
        raise UserError(f"{source} is no run, and only runs store averages to make others from (ema.post_hoc).")
    found = reconstruct(source, settings.ema_length)
    print(f"average of length {settings.ema_length:g}, made of {len(found.parts)}, its profile {found.error:.2%} off")
    return replace(model, states={**model.states, "ema": lambda: dict(found.weights())}, average=None)


def _export_compvis(model: StoredModel, output: Path, settings: ExportSettings) -> None:
    both = settings.weights == "both"
    state = model.state("raw" if settings.weights != "ema" else "ema")
    average = model.state("ema") if both else None
    write_compvis(model, output, model.frozen(), state, average, torch_dtype(settings.dtype))


def _export_diffusers(model: StoredModel, output: Path, settings: ExportSettings) -> None:
    first: Weights = "raw" if settings.weights == "raw" else "ema"
    unet, dtype = _cast(model.unet(first), settings.dtype), settings.dtype
    raw = _cast(model.unet("raw"), dtype) if settings.weights == "both" else None
    frozen = model.frozen()
    frozen = FrozenModels(_cast(frozen.vae, dtype), frozen.tokenizer, _cast(frozen.text_encoder, dtype))
    with _publish_folder(output) as temporary:
        _pipeline(unet, frozen, make_scheduler(None, model.scheduler_config)).save_pretrained(temporary)
        if raw is not None:
            raw.save_pretrained(temporary / "unet", variant=RAW_VARIANT)
        _forget_places(temporary)
        _record_sizes(temporary, model.trained_px)


def _cast(network: Network, dtype: Fixed) -> Network:
    state = {name: cast(tensor, torch_dtype(dtype), name) for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network


def write_pipeline(unet: UNet2DConditionModel, config: TrainConfig, output: Path) -> Path:
    """Writes `unet` with the config's frozen networks as a diffusers folder, whole or not at all.

    UserError if `output` holds anything but an earlier export.
    """
    _require_replaceable(output)
    pipeline = _pipeline(unet, load_frozen(config.vae, config.text_encoder), sampling_scheduler(config.diffusion))
    with _publish_folder(output) as temporary:
        pipeline.save_pretrained(temporary)
        _forget_places(temporary)
        _record_sizes(temporary, trained_sizes(config))
    return output


def _pipeline(unet: UNet2DConditionModel, frozen: FrozenModels, scheduler: object) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=frozen.vae,
        text_encoder=frozen.text_encoder,
        tokenizer=frozen.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _forget_places(folder: Path) -> None:
    """Removes the path of this machine that diffusers records in each config."""
    for path in folder.glob("*/config.json"):
        content = json.loads(path.read_text())
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _record_sizes(folder: Path, sizes: Sequence[Sequence[int]]) -> None:
    """Notes the sizes of the training images, if known, in the UNet's config."""
    path = folder / "unet" / "config.json"
    if sizes:
        content = json.loads(path.read_text()) | {TRAINED_PX: [list(size) for size in sizes]}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _require_replaceable(target: Path) -> None:
    if target.exists() and not (target / "model_index.json").exists():
        raise UserError(f"{target} exists and is not an earlier export; choose another output.")


@contextmanager
def _publish_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder and replaces `target` with it if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        yield temporary
        if target.exists():
            target.replace(replaced)
        temporary.replace(target)
    except OSError as error:
        raise_if_disk_full(error, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
