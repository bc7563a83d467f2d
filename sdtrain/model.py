"""The three networks: UNet (trained), VAE and text encoder (frozen)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdtrain.config.sections import SpeedConfig, UNetConfig
from sdtrain.errors import UserError

DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"
LATENT_CHANNELS = 4
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"

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


def load_vae(name: str) -> AutoencoderKL:
    """The frozen autoencoder in fp32, from a folder, a hub id, or `demo`.

    Raises:
        UserError: it is not there, or not an AutoencoderKL.
    """
    folder = find_weights(name, "vae")
    try:
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a VAE that diffusers can load: {error}") from error
    return vae.requires_grad_(False).eval()


def load_text_encoder(name: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the frozen text encoder in fp32, from a folder, a hub id, or `demo`.

    Raises:
        UserError: they are not there, or not CLIP's.
    """
    folder = find_weights(name, "text_encoder")
    tokenizer = load_tokenizer(name)
    try:
        encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a CLIP text encoder: {error}") from error
    return tokenizer, encoder.requires_grad_(False).eval()


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
        UserError: neither a folder nor a model that the hub gives out.
    """
    root = DEMO_WEIGHTS if name == "demo" else Path(name)
    if not root.is_dir():
        if name == "demo" or name.startswith((".", "/")) or name.count("/") != 1:
            raise UserError(f"There is no folder {root} with a {part}. Give a diffusers folder or a hub id.")
        root = _download(name, part)
    folder = root / part if (root / part).is_dir() else root
    if not any(folder.glob("*.json")):
        raise UserError(f"The folder {folder} holds no {part}. Give a diffusers folder or a hub id.")
    return folder


def _download(name: str, part: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [f"{part}/*.json", f"{part}/*.txt", "*.json", "*.txt"]
    if part != "tokenizer":  # CLIP's weights lie beside its tokenizer
        wanted += [f"{part}/model.safetensors", f"{part}/{VAE_WEIGHTS}", "model.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"The {part} '{name}' is not a folder here and the hub did not give it ({type(error).__name__}). "
            "Check the name and the connection, or download it elsewhere and name the folder."
        ) from error


def vae_digest(name: str) -> str:
    """Hex sha256 over the VAE's tensors by name: the same weights give the same digest in any file.

    Raises:
        UserError: no safetensors weights there.
    """
    path = find_weights(name, "vae") / VAE_WEIGHTS
    if not path.exists():
        raise UserError(f"There is no {path}. Save the VAE as safetensors, with diffusers' save_pretrained.")
    digest = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key)
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return digest.hexdigest()


def vae_scaling_factor(name: str) -> float:
    """What the VAE's latents are multiplied by, from its config.json (SD v1: 0.18215).

    Raises:
        UserError: no such VAE.
    """
    path = find_weights(name, "vae") / "config.json"
    try:
        return float(json.loads(path.read_text())["scaling_factor"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not the config of a VAE with a scaling_factor.") from error
