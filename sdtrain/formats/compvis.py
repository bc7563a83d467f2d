"""CompVis' single file: a model's tensors under the names that the original code gave them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.formats.buffers import UNCOUNTED, average_buffers, position_ids, schedule_buffers
from sdtrain.formats.compvis_layout import Architecture, sd_v1
from sdtrain.formats.compvis_names import TEXT, TEXT_STAGE, average_name
from sdtrain.formats.dtypes import cast
from sdtrain.formats.spellings import Fitted, PartOf, compvis_name, one_name_each
from sdtrain.formats.stored_model import Average, Frozen, State, StoredModel, Weights
from sdtrain.formats.tensor_file import NOTES, TensorFile
from sdtrain.models.build import load_tokenizer, text_encoder_of, vae_of


def open_compvis(path: Path, tokenizer: str | None = None) -> StoredModel:
    """A model in one file: a public SD v1, or one that sdtrain wrote.

    Args:
        path: `.safetensors`, or a pickle of PyTorch, of which tensors are read and nothing is run.
        tokenizer: folder, hub id or `demo`; by default CLIP's, which the file does not hold.

    Raises:
        UserError: a damaged file, one that asks for code to be run, or one of another model.
    """
    file = TensorFile(path)
    architecture = sd_v1() if file.notes is None else Architecture.from_json(file.notes, str(path))
    stored = one_name_each(file, compvis_name, str(path))
    names = architecture.unet_names
    average_names = {name: average_name(there) for name, there in names.items()}
    average = _average_of(file, average_names)
    if average is not None and not any(there in stored for there in names.values()):
        # The average alone, under its own names: it is what the file has to give.
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
        unet_config=architecture.unet,
        scheduler_config=architecture.scheduler,
        states={kind: partial(dict, tensors) for kind, tensors in weights.items()},
        frozen=lambda: _frozen(file, architecture, name),
        average=average,
        tokenizer_name=architecture.tokenizer,
    )


def _average_of(file: TensorFile, names: Mapping[str, str]) -> Average | None:
    missing = [stored for stored in names.values() if stored not in file]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"{file.path} holds a part of the averaged weights only: {missing[0]} is missing.")
    decay = float(file.get("model_ema.decay", torch.zeros(())))
    counted = float(file.get("model_ema.num_updates", torch.tensor(UNCOUNTED)))
    # In a file that was cast to half precision, a number above 65,504 is infinite.
    return Average(decay, int(counted) if math.isfinite(counted) and counted >= 0 else None)


def _frozen(file: TensorFile, architecture: Architecture, tokenizer: str | None) -> Frozen:
    if tokenizer is None:
        raise UserError(f"{file.path} does not say which tokenizer belongs to it; name one with --tokenizer.")
    text_config = CLIPTextConfig.from_dict(dict(architecture.text_encoder))
    encoder = text_encoder_of(PartOf(file, TEXT_STAGE), text_config, str(file.path))
    found = load_tokenizer(tokenizer)
    if len(found) > text_config.vocab_size:
        raise UserError(
            f"The tokenizer '{tokenizer}' has {len(found)} tokens, but the text encoder in {file.path} knows "
            f"{text_config.vocab_size}; name the one that belongs to it with --tokenizer."
        )
    return Frozen(vae_of(file, architecture.vae).load(), found, encoder)


def write_compvis(
    model: StoredModel, path: Path, frozen: Frozen, state: State, average: State | None, dtype: torch.dtype
) -> None:
    """Writes a model in one file, whole or not at all.

    The schedule's buffers stay in float32 whatever `dtype` is: it is not fine enough for them.

    Args:
        model: where configs come from.
        path: `.safetensors`, or `.ckpt` for a pickle of plain tensors, which loads with `weights_only`.
        frozen: VAE and text encoder.
        state: the UNet's tensors by diffusers' names.
        average: written as `model_ema.*` beside them, where given.
        dtype: of the weights.

    Raises:
        UserError: weights too large for `dtype`, a noise schedule that such files do not have, or a full disk.
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
            # Into an open file: of a path, torch.save writes the name into the file.
            with temporary.open("wb") as file:
                torch.save({"state_dict": tensors, "global_step": model.step, NOTES: notes}, file)
        else:
            save_file(tensors, temporary, metadata={NOTES: notes})  # of two entries, either may come first


def architecture_of(model: StoredModel, frozen: Frozen) -> Architecture:
    """The configs of a model's parts.

    Raises:
        UserError: a noise schedule that CompVis' files do not have.
    """
    scheduler = dict(model.scheduler_config)
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise UserError(
            f"{model.source} has {scheduler.get('beta_schedule')} betas, but a CompVis file holds SD v1's, which are "
            "scaled_linear. Export a diffusers folder."
        )
    text_config = frozen.text_encoder.config.to_dict()
    return Architecture(dict(model.unet_config), dict(frozen.vae.config), text_config, scheduler, model.tokenizer_name)


def stored_weights(architecture: Architecture, frozen: Frozen, state: State, average: State | None) -> State:
    """All weights by their names in a file, in the shapes that they have there."""
    vae, text = frozen.vae.state_dict(), frozen.text_encoder.state_dict()
    tensors = {stored: state[name] for name, stored in architecture.unet_names.items()}
    if average is not None:
        tensors |= {average_name(stored): average[name] for name, stored in architecture.unet_names.items()}
    for name, stored in architecture.vae_names.items():
        # The original has convolutions of one pixel where diffusers has matrix products.
        is_attention = ".mid.attn_1." in stored and vae[name].dim() == 2
        tensors[stored] = vae[name][:, :, None, None] if is_attention else vae[name]
    return tensors | {stored: text[name] for name, stored in architecture.text_names.items()}
