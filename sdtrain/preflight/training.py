"""Checks of a training run: networks, latents, initial model, trackers, and room for checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sdtrain.config import TrainConfig
from sdtrain.encode.vae import check_vae
from sdtrain.errors import UserError
from sdtrain.preflight.checks import Check, check_room, check_writable
from sdtrain.preflight.networks import check_text_encoder

_STATE_BYTES = 16
"""Of a checkpoint, per parameter: weights, their average and two moments, float32."""


def training_checks(config: TrainConfig, output: Path, is_later_in_chain: bool = False) -> list[Check]:
    """Checks everything that a run reads or writes; if `is_later_in_chain`, `init_from` may not exist yet."""
    checks = [
        Check("unet", lambda: f"{_num_parameters(config):,} parameters"),
        Check("vae", lambda: check_vae(config.vae)),
        Check("text_encoder", lambda: check_text_encoder(config.text_encoder, config.unet.cross_attention_dim)),
        Check("data", lambda: _check_data(config)),
        Check("optimizer.moments", lambda: check_moments(config)),
    ]
    if config.init_from is not None and not is_later_in_chain:
        checks.append(Check("init_from", lambda: _check_start(config)))
    return [*checks, *(check for check in late_checks(config, output) if check.name != "vae")]


def late_checks(config: TrainConfig, output: Path) -> list[Check]:
    """Checks of resources that training needs only after hours; all others it opens before its first step."""
    checks = [
        Check("output", lambda: check_writable(output)),
        Check("checkpoint", lambda: _check_room(config, output)),
        Check("tracking", lambda: check_trackers(config)),
    ]
    if not config.previews.every:
        return checks
    return [Check("vae", lambda: check_vae(config.vae)), *checks, Check("previews", lambda: _check_previews(config))]


def _check_previews(config: TrainConfig) -> str:
    from sdtrain.models.schedulers import check_num_steps, sampling_scheduler

    check_num_steps(None, sampling_scheduler(config.diffusion).config, config.previews.num_steps)
    return f"{len(config.previews.prompts)} images every {config.previews.every:,} steps"


def _num_parameters(config: TrainConfig) -> int:
    import torch

    from sdtrain.models.unet import build_unet

    try:
        with torch.device("meta"):
            return int(build_unet(config.unet, config.latent_size).num_parameters())
    except ValueError as error:
        raise UserError(f"diffusers cannot build the config's `unet`: {error}") from error


def _check_data(config: TrainConfig) -> str:
    from sdtrain.formats.frozen import vae_scaling_factor
    from sdtrain.loading.sources import make_plan, open_samples, require_samples

    require_samples(config.data)
    store = open_samples(config, vae_scaling_factor(config.vae))
    make_plan(store, config, config.validation.num_samples)
    return f"{config.data.name}: {int(store.counts.sum()):,} samples"


def check_moments(config: TrainConfig) -> str:
    """Raises UserError if 8-bit moments are wanted and bitsandbytes is not installed."""
    if config.optimizer.moments != "fp32" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("optimizer.moments: int8 needs bitsandbytes: pip install 'sdtrain[eight-bit]'.")
    return config.optimizer.moments


def _check_start(config: TrainConfig) -> str:
    from sdtrain.formats.any_model import open_model

    path = Path(str(config.init_from))
    if not path.exists():
        raise UserError(f"There is no run or model {path}, which init_from names.")
    model = open_model(path)
    theirs = model.unet_config["block_out_channels"]
    if tuple(theirs) != tuple(config.unet.block_out_channels):
        raise UserError(
            f"init_from: the UNet in {path} has {tuple(theirs)} channels, and the config's `unet` "
            f"{tuple(config.unet.block_out_channels)}."
        )
    return model.source


def check_trackers(config: TrainConfig) -> str:
    """Raises UserError if Weights & Biases is wanted and not installed."""
    if config.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("tracking.wandb_project needs the package wandb: pip install wandb, or set it to null.")
    return "TensorBoard" + (" and Weights & Biases" if config.tracking.wandb_project else "")


def _check_room(config: TrainConfig, output: Path) -> str:
    chosen = config.checkpoint
    kept = config.steps // chosen.keep_every if chosen.keep_every else 0
    present = output / "checkpoints"
    there = len(list(present.iterdir())) if present.is_dir() else 0
    number = max(1, min(chosen.keep_last + 1 + kept, config.steps // chosen.every + 1) - there)
    lengths, size = len(config.ema.post_hoc), _num_parameters(config)
    wanted = number * (_STATE_BYTES + 4 * lengths) * size
    if not lengths:
        return check_room(output, wanted, f"{number} more checkpoints")
    snapshots = config.steps // chosen.every + 1 - len(list((output / "averages").glob("step-*")))
    wanted += max(0, snapshots) * lengths * (2 if config.ema.snapshots == "fp16" else 4) * size
    return check_room(output, wanted, f"{number} more checkpoints and {max(0, snapshots)} snapshots of averages")
