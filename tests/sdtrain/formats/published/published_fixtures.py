"""Folders with exactly the structure of the public SD v1: its config keys and tensor names, narrow and random.

The configs are the published ones where `shared/data/published` lies beside the checkout; the few facts in which they
differ are written down here, so that nothing depends on it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

State = dict[str, torch.Tensor]

SHARED = Path(__file__).parents[5] / "shared" / "data"
PUBLISHED = SHARED / "published"
VERSIONS = ("v1-4", "v1-5")
HIDDEN, POSITIONS = 64, 77

_VAE_2022 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_CONFIGS = {
    "v1-4": _VAE_2022 | {"scaling_factor": 0.18215},
    "v1-5": _VAE_2022 | {"_diffusers_version": "0.6.0", "norm_num_groups": 32},
    "sd-vae-ft-mse": _VAE_2022 | {"_diffusers_version": "0.4.2", "norm_num_groups": 32, "sample_size": 256},
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_UNET_LATER = {
    "_diffusers_version": "0.12.0.dev0",
    "class_embed_type": None,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
UNET_CONFIGS = {"v1-4": _UNET | _UNET_LATER, "v1-5": _UNET}
_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": POSITIONS,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
}
TEXT_CONFIGS = {"v1-4": _TEXT, "v1-5": _TEXT | {"projection_dim": 768, "transformers_version": "4.22.0.dev0"}}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
PREPROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
# What is narrow here. Widths differ where the published ones do, for there a network has shortcuts.
_NARROW = {
    "vae": {"block_out_channels": [32, 64, 96, 96]},
    "unet": {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": HIDDEN, "sample_size": 8},
    "text_encoder": {
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 54,
    },
}
_FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def config_of(version: str, part: str, name: str = "config.json") -> dict[str, Any]:
    """A published config: the real one, or what is written down of it; narrow."""
    path = PUBLISHED / f"stable-diffusion-{version}" / part / name
    known = {"vae": VAE_CONFIGS, "unet": UNET_CONFIGS, "text_encoder": TEXT_CONFIGS}[part]
    config = json.loads(path.read_text()) if path.is_file() else known[version]
    return config | _NARROW[part]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def randomised(network: torch.nn.Module, seed: int) -> State:
    """The network's own initialisation, biases and norms included, shifted by a little that is random."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    return {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in state.items()}


@lru_cache
def vae_state(version: str = "v1-4", seed: int = 0) -> State:
    """A VAE's tensors by the names that diffusers has for them today."""
    torch.manual_seed(seed)
    return randomised(AutoencoderKL.from_config(config_of(version, "vae")), seed)


def former(state: State) -> State:
    """As published VAE files name them: those of before 2023."""
    found = {}
    for name, tensor in state.items():
        for today, before in _FORMER.items():
            name = name.replace(f".attentions.0.{today}.", f".attentions.0.{before}.")
        found[name] = tensor
    return found


@lru_cache
def text_state(version: str = "v1-4") -> State:
    """The text encoder's tensors as published: `text_model.`, and the positions as int64."""
    torch.manual_seed(1)
    state = randomised(CLIPTextModel(CLIPTextConfig.from_dict(config_of(version, "text_encoder"))), 1)
    named = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return named | {"text_model.embeddings.position_ids": torch.arange(POSITIONS)[None]}


@lru_cache
def unet_state(version: str = "v1-4") -> State:
    torch.manual_seed(2)
    return randomised(UNet2DConditionModel.from_config(config_of(version, "unet")), 2)


def save(state: State, path: Path) -> Path:
    """As safetensors, or as PyTorch's pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)
    return path


def halved(state: State) -> State:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def write_vae(folder: Path, version: str = "v1-4") -> Path:
    write_json(folder / "config.json", VAE_CONFIGS[version] | _NARROW["vae"])
    save(former(vae_state(seed=3)), folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_published(root: Path, version: str) -> Path:
    """A public folder with everything but the safety checker."""
    for part, state in (
        ("vae", former(vae_state(version))),
        ("unet", unet_state(version)),
        ("text_encoder", text_state(version)),
    ):
        write_json(root / part / "config.json", config_of(version, part))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save(state, root / part / f"{stem}.safetensors")
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(root / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    write_json(root / "model_index.json", {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.2.2"})
    write_tokenizer(root / "tokenizer")
    return root


def write_tokenizer(folder: Path) -> None:
    """CLIP's kind of tokenizer with the letters alone: 54 tokens instead of 49,408."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    folder.mkdir(parents=True)
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=POSITIONS).save_pretrained(folder)


def write_checker(folder: Path) -> State:
    """The safety checker, narrow, with the names of its published file: the vision model nested, and its positions."""
    path = PUBLISHED / "stable-diffusion-v1-4" / "safety_checker" / "config.json"
    real = json.loads(path.read_text()) if path.is_file() else {"model_type": "clip", "text_config": {}}
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = real.get("vision_config", {}) | narrow | {"patch_size": 56, "image_size": 224}
    config = real | {"vision_config": vision, "text_config": real["text_config"] | narrow, "projection_dim": 16}
    # Beside the configs in full lie the few keys that were chosen, and they win over them.
    config |= {"vision_config_dict": narrow | {"patch_size": 56}, "text_config_dict": narrow}
    torch.manual_seed(4)
    state = StableDiffusionSafetyChecker(CLIPConfig.from_dict(config)).state_dict()
    named = {}
    for name, tensor in state.items():
        rest = name.removeprefix("vision_model.").removeprefix("vision_model.")
        named[f"vision_model.vision_model.{rest}" if name.startswith("vision_model.") else name] = tensor
    named["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_json(folder / "config.json", config)
    save(named, folder / "model.safetensors")
    return named
