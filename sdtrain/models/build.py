"""The three networks: UNet (trained), VAE and text encoder (frozen)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdtrain.config.sections import SpeedConfig, UNetConfig
from sdtrain.errors import UserError
from sdtrain.formats.compvis_names import VAE, vae_modules
from sdtrain.formats.part_files import files_of, find_part, open_part, published_names
from sdtrain.formats.published import SCALING_FACTOR, VAE_CONFIG, require_published
from sdtrain.formats.spellings import Fitted, PartOf, Stored, fit, former_vae_name, text_name, vae_name
from sdtrain.formats.tensor_file import TensorFile

DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
LATENT_CHANNELS = 4

transformers_logging.disable_progress_bar()


def build_unet(config: UNetConfig, latent_size: int) -> UNet2DConditionModel:
    """An untrained UNet in fp32, initialised as CompVis does.

    Args:
        config: the architecture.
        latent_size: height and width of the latents, written into the model's config for pipelines.
    """
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_num_groups,
    )
    zero_initialise(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


@torch.no_grad()
def zero_initialise(unet: UNet2DConditionModel) -> None:
    """Zeroes the last layer of every residual branch, and the output.

    So every block begins as the identity and the first prediction is 0: `zero_module` in CompVis/stable-diffusion,
    ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py. diffusers' own constructor does not.
    """
    last_layers: list[torch.nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last_layers.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            last_layers.append(module.proj_out)
    for layer in last_layers:
        for parameter in layer.parameters():
            parameter.zero_()


def prepare_for(
    unet: UNet2DConditionModel, device: torch.device, speed: SpeedConfig | None = None, for_training: bool = False
) -> UNet2DConditionModel:
    """Puts the UNet on `device` with the attention and the memory layout that `speed` asks for, or that are fast there.

    On the CPU the fused attention's bf16 backward pass took 43 % of a training step of the tiny UNet; plain matrix
    products are 1.6 times faster. channels_last pays off on CUDA only.
    """
    speed = speed or SpeedConfig()
    is_plain = speed.attention == "plain" or (speed.attention == "auto" and device.type == "cpu")
    unet.set_attn_processor(AttnProcessor() if is_plain else AttnProcessor2_0())
    layout = memory_format(device, speed)
    # ZeRO lays the weights out anew, one behind the other, and DeepSpeed cannot take them in another layout.
    return unet.to(device=device, memory_format=torch.contiguous_format if for_training else layout)


def memory_format(device: torch.device, speed: SpeedConfig) -> torch.memory_format:
    """The layout of the UNet's input, which its convolutions hand on."""
    channels_last = device.type != "cpu" if speed.channels_last is None else speed.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


@dataclass(frozen=True)
class StoredVae:
    """A VAE in files; its tensors are read when asked for, but their names and shapes are checked at once.

    Attributes:
        where: the folder or the file, for messages.
        config: in diffusers' words, with a scaling factor.
        files: that hold its tensors.
    """

    where: Path
    config: Mapping[str, Any]
    files: Stored

    def __post_init__(self) -> None:
        _ = self.tensors  # names and shapes are looked at before there is any work that could be lost

    @cached_property
    def tensors(self) -> Fitted:
        """By the names that diffusers gives them today, whatever they are called in the files.

        Raises:
            UserError: they are not those of the config's network.
        """
        empty = self.empty()
        return fit(self.files, empty, vae_name(vae_modules(empty.config)), str(self.where))

    def empty(self) -> AutoencoderKL:
        """The network, whose parameters have shapes but no memory.

        Raises:
            UserError: the config is of another network.
        """
        try:
            with torch.device("meta"):
                return AutoencoderKL.from_config(dict(self.config))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{self.where} is not a VAE that diffusers can load: {error}") from error

    def load(self) -> AutoencoderKL:
        """The frozen network in fp32.

        Raises:
            UserError: the tensors are not those of the config's network.
        """
        vae = self.empty()
        vae.load_state_dict({name: tensor.float() for name, tensor in self.tensors.items()}, assign=True)
        return vae.requires_grad_(False).eval()


def open_vae(name: str) -> StoredVae:
    """A VAE of a folder, a hub id, `demo`, or a file: an SD v1 in one file, or SD v1's VAE alone.

    Raises:
        UserError: it is not there, or not an AutoencoderKL; its files are damaged, or ask for code to be run.
    """
    if Path(name).is_file():
        return _open_vae_file(Path(name))
    folder = find_weights(name, "vae")
    config = _read_vae_config(folder / "config.json")
    return StoredVae(folder, config, open_part(folder, "vae"))


def _open_vae_file(path: Path) -> StoredVae:
    from sdtrain.formats.compvis_layout import Architecture  # late: it builds networks with this module

    file = TensorFile(path)
    return vae_of(file, VAE_CONFIG if file.notes is None else Architecture.from_json(file.notes, str(path)).vae)


def vae_of(file: TensorFile, config: Mapping[str, Any]) -> StoredVae:
    """The VAE in a file, alone or with the other networks.

    Raises:
        UserError: the file holds another one, or none.
    """
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
    """The frozen autoencoder in fp32; `name` as for `open_vae`.

    Raises:
        UserError: it is not there, or not an AutoencoderKL.
    """
    return open_vae(name).load()


def load_text_encoder(name: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the frozen text encoder in fp32, from a folder, a hub id, or `demo`.

    Raises:
        UserError: they are not there, or not CLIP's.
    """
    folder = find_weights(name, "text_encoder")
    tokenizer = load_tokenizer(name)
    try:
        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a CLIP text encoder: {error}") from error
    return tokenizer, text_encoder_of(open_part(folder, "text_encoder"), config, str(folder))


def text_encoder_of(stored: Stored, config: CLIPTextConfig, where: str) -> CLIPTextModel:
    """The frozen text encoder in fp32.

    Args:
        stored: files that hold its tensors, by whatever names.
        config: of the network.
        where: names the files in messages.

    Raises:
        UserError: the tensors are not those of the config's network.
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
    """The tokenizer of a text encoder, from a folder, a hub id, or `demo`.

    Raises:
        UserError: it is not there, or not CLIP's.
    """
    folder = find_weights(name, "tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a CLIP tokenizer: {error}") from error


def find_weights(name: str, part: str) -> Path:
    """The local folder of one part (`vae`, `text_encoder`, `tokenizer`) of a model, fetched from the hub if need be.

    Raises:
        UserError: neither a folder nor a model that the hub gives out; a fetched file is not the published one.
    """
    root = DEMO_WEIGHTS if name == "demo" else Path(name)
    if root.is_file():
        raise UserError(f"{root} is a file, and a {part} is taken from a folder. Give a diffusers folder or a hub id.")
    is_fetched = not root.is_dir()
    if is_fetched:
        if name == "demo" or name.startswith((".", "/")) or name.count("/") != 1:
            raise UserError(f"There is no folder {root} with a {part}. Give a diffusers folder or a hub id.")
        root = _download(name, part)
    folder = _part_folder(root, part)
    if not any(folder.glob("*.json")):
        raise UserError(f"The folder {folder} holds no {part}. Give a diffusers folder or a hub id.")
    if is_fetched and (found := _weights_in(folder, part)):
        for path in files_of(found):
            require_published(name, path.relative_to(root).as_posix(), path)
    return folder


def _part_folder(root: Path, part: str) -> Path:
    return root / part if (root / part).is_dir() else root


def _weights_in(folder: Path, part: str) -> Path | None:
    return None if part == "tokenizer" else find_part(folder, part)  # CLIP's weights lie beside its tokenizer


def _download(name: str, part: str) -> Path:
    """The safetensors of full precision, or whatever else there is that can be read."""
    wanted = [f"{part}/*.json", f"{part}/*.txt", "*.json", "*.txt"]
    if part == "tokenizer":
        return _snapshot(name, part, wanted)
    for patterns in published_names(part):
        root = _snapshot(name, part, [*wanted, *(f"{part}/{pattern}" for pattern in patterns), *patterns])
        if _weights_in(_part_folder(root, part), part):
            break
    return root


def _snapshot(name: str, part: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"The {part} '{name}' is not a folder here and the hub did not give it ({type(error).__name__}). "
            "Check the name and the connection, or download it elsewhere and name the folder."
        ) from error


def vae_digest(name: str) -> str:
    """What identifies a VAE: hex sha256 over its tensors, by the names that diffusers gives them today.

    Other tensor names, another file format, a folder or an SD v1 in one file change nothing. The dtype counts: a file
    of fp16 weights is another function, for its numbers were rounded. In which precision the network then computes is
    not part of it: latents/info.json says that beside it.

    Raises:
        UserError: no such VAE.
    """
    return next(vae_digests(name))


def vae_digests(name: str) -> Iterator[str]:
    """`vae_digest`, then what else means the same VAE.

    Earlier versions reckoned with the names in the file, which are those of before 2023 in public ones; and the numbers
    of a file of fp16 are the same function when another file holds them in fp32.

    Raises:
        UserError: no such VAE.
    """
    tensors = open_vae(name).tensors
    for dtype in (None, torch.float32):
        for spelling in (str, former_vae_name):
            yield _digest(tensors, spelling, dtype)


def recorded_vae_digest(name: str, recorded: str | None) -> str:
    """The digest by which a dataset goes on knowing a VAE.

    Args:
        name: of the VAE.
        recorded: what the dataset has written down, if anything.

    Returns:
        `recorded` if it means this VAE, by today's rule or by an earlier one; otherwise `vae_digest`.

    Raises:
        UserError: no such VAE.
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


def vae_scaling_factor(name: str) -> float:
    """What the VAE's latents are multiplied by; SD v1's 0.18215, where its config says nothing of it.

    Raises:
        UserError: no such VAE.
    """
    if Path(name).is_file():
        return float(_open_vae_file(Path(name)).config["scaling_factor"])
    return float(_read_vae_config(find_weights(name, "vae") / "config.json")["scaling_factor"])
