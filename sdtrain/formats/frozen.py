"""Loads the networks that training freezes, VAE and text encoder, from folders, the hub or single files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdtrain.errors import UserError
from sdtrain.formats.compvis_layout import SCALING_FACTOR, VAE_CONFIG, Architecture
from sdtrain.formats.fitting import Fitted, PartOf, Stored, fit
from sdtrain.formats.hub import find_part_folder
from sdtrain.formats.names import VAE, former_vae_name, text_name, vae_modules, vae_name
from sdtrain.formats.part_files import open_part
from sdtrain.formats.stored_model import FrozenModels
from sdtrain.formats.tensor_file import TensorFile

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class StoredVae:
    """A VAE in files, whose tensors are read on access; their names and shapes are checked at once.

    `where` is the folder or file, for messages; `config` is in diffusers' terms, with a scaling factor.
    """

    where: Path
    config: Mapping[str, Any]
    files: Stored

    def __post_init__(self) -> None:
        _ = self.tensors  # checks names and shapes before there is work to lose

    @cached_property
    def tensors(self) -> Fitted:
        """By diffusers' current names; UserError if they do not fit the config's network."""
        empty = self.empty()
        return fit(self.files, empty, vae_name(vae_modules(empty.config)), str(self.where))

    def empty(self) -> AutoencoderKL:
        """The network with shapes but no memory; UserError if the config is another network's."""
        try:
            with torch.device("meta"):
                return AutoencoderKL.from_config(dict(self.config))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{self.where} is not a VAE that diffusers can load: {error}") from error

    def load(self) -> AutoencoderKL:
        """The frozen network in fp32; UserError if the tensors do not fit it."""
        vae = self.empty()
        vae.load_state_dict({name: tensor.float() for name, tensor in self.tensors.items()}, assign=True)
        return vae.requires_grad_(False).eval()


def open_vae(name: str) -> StoredVae:
    """Opens the VAE in a folder, a hub id, `demo`, or a file: a whole SD v1 or its VAE alone.

    UserError if it is missing or not an AutoencoderKL, or its files are damaged or ask to run code.
    """
    if Path(name).is_file():
        return _open_vae_file(Path(name))
    folder = find_part_folder(name, "vae")
    config = _read_vae_config(folder / "config.json")
    return StoredVae(folder, config, open_part(folder, "vae"))


def _open_vae_file(path: Path) -> StoredVae:
    file = TensorFile(path)
    return vae_of(file, VAE_CONFIG if file.notes is None else Architecture.from_json(file.notes, str(path)).vae)


def vae_of(file: TensorFile, config: Mapping[str, Any]) -> StoredVae:
    """The VAE in a file, alone or beside other networks; UserError if the file holds another one, or none."""
    return StoredVae(file.path, _with_scaling_factor(config, file.path), PartOf(file, VAE))


def _read_vae_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the config of a VAE: {error}") from error
    kind = config.get("_class_name", "AutoencoderKL") if isinstance(config, dict) else "no mapping"
    if kind != "AutoencoderKL":
        raise UserError(
            f"{path} is not the config of a VAE that diffusers can load here: it is {kind}, and not AutoencoderKL."
        )
    return _with_scaling_factor(config, path)


def _with_scaling_factor(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    factor = config.get("scaling_factor")
    factor = SCALING_FACTOR if factor is None else factor
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not math.isfinite(factor) or factor <= 0:
        raise UserError(f"{path}: scaling_factor is {factor!r}, and has to be a number above 0.")
    return {**config, "scaling_factor": float(factor)}


def load_vae(name: str) -> AutoencoderKL:
    """Loads the frozen autoencoder in fp32; name and UserError as for `open_vae`."""
    return open_vae(name).load()


def load_text_encoder(name: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Loads the tokenizer and the frozen fp32 text encoder from a folder, a hub id or `demo`.

    UserError if they are missing or not CLIP's.
    """
    folder = find_part_folder(name, "text_encoder")
    tokenizer = load_tokenizer(name)
    try:
        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a CLIP text encoder: {error}") from error
    return tokenizer, text_encoder_of(open_part(folder, "text_encoder"), config, str(folder))


def text_encoder_of(stored: Stored, config: CLIPTextConfig, where: str) -> CLIPTextModel:
    """The frozen text encoder in fp32, from files with its tensors under whatever names.

    `where` names the files in messages. UserError if the tensors do not fit the network.
    """
    try:
        with torch.device("meta"):
            empty = CLIPTextModel(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{where} is not a CLIP text encoder: {error}") from error
    is_nested = any(name.startswith("text_model.") for name in empty.state_dict())
    tensors = dict(fit(stored, empty, text_name(is_nested), where))
    encoder = CLIPTextModel.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    return encoder.requires_grad_(False).eval()


def load_tokenizer(name: str) -> CLIPTokenizer:
    """Loads a text encoder's tokenizer from a folder, a hub id or `demo`; UserError if it is missing or not CLIP's."""
    folder = find_part_folder(name, "tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a CLIP tokenizer: {error}") from error


def vae_digest(name: str) -> str:
    """Identifies a VAE: hex sha256 over its tensors, by diffusers' current names.

    Tensor names, file format, and whether it is a folder or an SD v1 in one file do not matter. The dtype does: fp16
    weights are rounded, hence another function. The precision of the computation is recorded in latents/info.json
    instead. UserError if there is no such VAE.
    """
    return next(vae_digests(name))


def vae_digests(name: str) -> Iterator[str]:
    """Yields `vae_digest`, then the older digests of the same VAE.

    Earlier versions hashed the file's own names, which in public files predate 2023; and fp16 weights are the same
    function when another file holds them in fp32. UserError if there is no such VAE.
    """
    tensors = open_vae(name).tensors
    for dtype in (None, torch.float32):
        for spelling in (str, former_vae_name):
            yield _digest(tensors, spelling, dtype)


def recorded_vae_digest(name: str, recorded: str | None) -> str:
    """The digest under which a dataset keeps a VAE; UserError if there is no such VAE.

    That is the dataset's `recorded` one if it means this VAE, by the current rule or an earlier one; else `vae_digest`.
    """
    digests = vae_digests(name)
    first = next(digests)
    return recorded if recorded is not None and (recorded == first or recorded in digests) else first


def _digest(tensors: Mapping[str, torch.Tensor], spelling: Callable[[str], str], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for there, key in sorted((spelling(key), key) for key in tensors):
        tensor = tensors[key] if dtype is None else tensors[key].to(dtype)
        digest.update(f"{there} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def text_encoder_digest(name: str) -> str:
    """Identifies a text encoder with its tokenizer: hex sha256 over tensors, config, vocabulary and merges.

    Tensor names in the file and its format do not matter. UserError if there is no such text encoder.
    """
    tokenizer, encoder = load_text_encoder(name)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {part: rules[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    config = encoder.config
    shape = [config.num_attention_heads, config.hidden_act, config.layer_norm_eps, tokenizer.model_max_length]
    described = json.dumps([_digest(encoder.state_dict(), str, None), shape, tokens], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def vae_scaling_factor(name: str) -> float:
    """The factor by which latents are multiplied; 0.18215, SD v1's, if the config has none. UserError: no such VAE."""
    if Path(name).is_file():
        return float(_open_vae_file(Path(name)).config["scaling_factor"])
    return float(_read_vae_config(find_part_folder(name, "vae") / "config.json")["scaling_factor"])


def load_frozen(vae: str, text_encoder: str) -> FrozenModels:
    """VAE, tokenizer and text encoder, with names and errors as for `load_vae` and `load_text_encoder`."""
    return FrozenModels(load_vae(vae), *load_text_encoder(text_encoder))
