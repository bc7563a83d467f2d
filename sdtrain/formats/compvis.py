"""Reads and writes CompVis' single file: a model's tensors under the original code's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from sdtrain.dataset.files import publish
from sdtrain.diffusion import Floats, zero_terminal_snr
from sdtrain.errors import UserError
from sdtrain.formats.compvis_layout import Architecture, sd_v1
from sdtrain.formats.fitting import Fitted, PartOf, one_name_each
from sdtrain.formats.frozen import load_tokenizer, text_encoder_of, vae_of
from sdtrain.formats.names import TEXT, TEXT_STAGE, average_name, compvis_name
from sdtrain.formats.stored_model import Average, FrozenModels, State, StoredModel, Weights, cast, with_trained_size
from sdtrain.formats.tensor_file import NOTES, TensorFile

_SMALLEST = 1e-20
UNCOUNTED = -1
"""The number of updates in `LitEma` (CompVis/stable-diffusion, ldm/modules/ema.py) if it counts none."""


def open_compvis(path: Path, tokenizer: str | None = None) -> StoredModel:
    """A model in one file: a public SD v1, or one that sdtrain wrote.

    From a PyTorch pickle only tensors are read and nothing is run. `tokenizer` is a folder, hub id or `demo`; by
    default CLIP's, as the file holds none. UserError if the file is damaged, asks to run code, or holds another model.
    """
    file = TensorFile(path)
    architecture = sd_v1() if file.notes is None else Architecture.from_json(file.notes, str(path))
    stored = one_name_each(file, compvis_name, str(path))
    names = architecture.unet_names
    average_names = {name: average_name(there) for name, there in names.items()}
    average = _average_of(file, average_names)
    if average is not None and not any(there in stored for there in names.values()):
        # The file holds only the average, under its own names.
        stored |= {names[name]: there for name, there in average_names.items()}
        average = None
    architecture.require(stored, str(path))

    def taken(names: Mapping[str, str]) -> Fitted:
        there = {name: stored.get(compvis, compvis) for name, compvis in names.items()}
        return Fitted(file, there, architecture.unet_shapes, str(path))

    plain: Weights = "ema" if average is None else "raw"
    weights = {plain: taken(names)}
    if average is not None:
        weights["ema"] = taken(average_names)
    name = tokenizer or architecture.tokenizer
    return StoredModel(
        source=str(path),
        unet_config=with_trained_size(architecture.unet),
        scheduler_config=architecture.scheduler,
        states={kind: partial(dict, tensors) for kind, tensors in weights.items()},
        frozen=lambda: _frozen(file, architecture, name),
        average=average,
        tokenizer_name=architecture.tokenizer,
        tokenizer=lambda: load_tokenizer(_tokenizer_name(name, path)),
    )


def _tokenizer_name(name: str | None, path: Path) -> str:
    if name is None:
        raise UserError(f"{path} does not say which tokenizer belongs to it; name one with --tokenizer.")
    return name


def _average_of(file: TensorFile, names: Mapping[str, str]) -> Average | None:
    missing = [stored for stored in names.values() if stored not in file]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"{file.path} holds a part of the averaged weights only: {missing[0]} is missing.")
    decay = float(file.get("model_ema.decay", torch.zeros(())))
    counted = float(file.get("model_ema.num_updates", torch.tensor(UNCOUNTED)))
    # In a file cast to half precision, a number above 65,504 is infinite.
    return Average(decay, int(counted) if math.isfinite(counted) and counted >= 0 else None)


def _frozen(file: TensorFile, architecture: Architecture, tokenizer: str | None) -> FrozenModels:
    tokenizer = _tokenizer_name(tokenizer, file.path)
    text_config = CLIPTextConfig.from_dict(dict(architecture.text_encoder))
    encoder = text_encoder_of(PartOf(file, TEXT_STAGE), text_config, str(file.path))
    found = load_tokenizer(tokenizer)
    if len(found) > text_config.vocab_size:
        raise UserError(
            f"The tokenizer '{tokenizer}' has {len(found)} tokens, but the text encoder in {file.path} knows "
            f"{text_config.vocab_size}; name the one that belongs to it with --tokenizer."
        )
    return FrozenModels(vae_of(file, architecture.vae).load(), found, encoder)


def write_compvis(
    model: StoredModel, path: Path, frozen: FrozenModels, state: State, average: State | None, dtype: torch.dtype
) -> None:
    """Writes a model as one file, whole or not at all.

    Args:
        model: the source of the configs.
        path: `.safetensors`, or `.ckpt` for a pickle of plain tensors, which loads with `weights_only`.
        frozen: VAE and text encoder.
        state: the UNet's tensors by diffusers' names.
        average: if given, also written, as `model_ema.*`.
        dtype: of the weights; the schedule's buffers stay in float32, as half precision is too coarse for them.

    Raises:
        UserError: weights too large for `dtype`, a noise schedule that such files cannot hold, or a full disk.
    """
    architecture = architecture_of(model, frozen)
    weights = stored_weights(architecture, frozen, state, average)
    tensors = {name: cast(tensor, dtype, name).contiguous() for name, tensor in weights.items()}
    tensors |= schedule_buffers(model.scheduler_config)
    tensors[TEXT + "embeddings.position_ids"] = position_ids(frozen.text_encoder.config.max_position_embeddings)
    if average is not None:
        how = model.average or Average(0.0, None)
        tensors |= average_buffers(how.decay, how.num_updates)
    notes = architecture.to_json()
    with publish(path) as temporary:
        if path.suffix == ".ckpt":
            # Given a path, torch.save would write the name into the file.
            with temporary.open("wb") as file:
                torch.save({"state_dict": tensors, "global_step": model.step, NOTES: notes}, file)
        else:
            save_file(tensors, temporary, metadata={NOTES: notes})  # safetensors does not fix the order of two entries


def architecture_of(model: StoredModel, frozen: FrozenModels) -> Architecture:
    """The configs of a model's parts; UserError for a noise schedule that CompVis' files cannot hold."""
    scheduler = dict(model.scheduler_config)
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise UserError(
            f"{model.source} has {scheduler.get('beta_schedule')} betas, but a CompVis file holds SD v1's, which are "
            "scaled_linear. Export a diffusers folder."
        )
    text_config = frozen.text_encoder.config.to_dict()
    return Architecture(dict(model.unet_config), dict(frozen.vae.config), text_config, scheduler, model.tokenizer_name)


def stored_weights(architecture: Architecture, frozen: FrozenModels, state: State, average: State | None) -> State:
    """All weights, with the file's names and shapes."""
    vae, text = frozen.vae.state_dict(), frozen.text_encoder.state_dict()
    tensors = {stored: state[name] for name, stored in architecture.unet_names.items()}
    if average is not None:
        tensors |= {average_name(stored): average[name] for name, stored in architecture.unet_names.items()}
    for name, stored in architecture.vae_names.items():
        # The original has 1x1 convolutions where diffusers has matrix products.
        is_attention = ".mid.attn_1." in stored and vae[name].dim() == 2
        tensors[stored] = vae[name][:, :, None, None] if is_attention else vae[name]
    return tensors | {stored: text[name] for name, stored in architecture.text_names.items()}


def schedule_buffers(scheduler: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The twelve buffers of a scaled-linear noise schedule, each (T,), float32, computed in float64.

    `DDPM.register_schedule` in CompVis/stable-diffusion, ldm/models/diffusion/ddpm.py, with v_posterior = 0; the
    posterior is q(z_{t-1} | z_t, z_0) of Ho et al. 2020, arXiv:2006.11239, eq. 6, 7. `scheduler` is diffusers' config.
    """
    start, end, length = (scheduler[name] for name in ("beta_start", "beta_end", "num_train_timesteps"))
    betas: Floats = np.linspace(start**0.5, end**0.5, length, dtype=np.float64) ** 2
    if scheduler.get("rescale_betas_zero_snr"):
        rescaled = zero_terminal_snr(np.cumprod(1.0 - betas))
        betas = 1.0 - rescaled / np.append(1.0, rescaled[:-1])
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    before, noise = np.append(1.0, alpha_bar[:-1]), 1.0 - alpha_bar
    variance = betas * (1.0 - before) / noise
    with np.errstate(divide="ignore"):  # zero terminal SNR leaves no latent at the end
        values = {
            "betas": betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(noise),
            "log_one_minus_alphas_cumprod": np.log(noise),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alpha_bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alpha_bar - 1.0),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, _SMALLEST)),
            "posterior_mean_coef1": betas * np.sqrt(before) / noise,
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / noise,
        }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def average_buffers(decay: float, num_updates: int | None) -> dict[str, torch.Tensor]:
    """The file's buffers for the average: its largest decay and, if known, its number of updates."""
    return {
        "model_ema.decay": torch.tensor(decay, dtype=torch.float32),
        "model_ema.num_updates": torch.tensor(UNCOUNTED if num_updates is None else num_updates, dtype=torch.int32),
    }


def position_ids(num_positions: int) -> torch.Tensor:
    """Token positions, (1, 77), int64, which old versions of transformers store among CLIP's tensors."""
    return torch.arange(num_positions)[None]
