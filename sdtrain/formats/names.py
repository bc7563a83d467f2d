"""Maps tensor names between diffusers and CompVis' files, with one map for each network.

CompVis' names are those of CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py (UNet) and model.py
(VAE). Both sides count blocks in data order, so the maps follow from the config for any number of levels and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

UNET, VAE, TEXT_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TEXT = TEXT_STAGE + "transformer.text_model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_TRANSFORMER = TEXT_STAGE + "transformer."
_TEXT_MODULES = ("embeddings.", "encoder.", "final_layer_norm.")
# The leaves of the VAE's two attention layers: CompVis', diffusers' current, diffusers' before 2023.
_LEAVES = (
    ("norm", "group_norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)
_COMPVIS_LEAF = {name: leaf[0] for leaf in _LEAVES for name in leaf}
_DIFFUSERS_LEAF = {name: leaf[1] for leaf in _LEAVES for name in leaf}
_FORMER_LEAF = {leaf[1]: leaf[2] for leaf in _LEAVES}
_COMPVIS_ATTENTION, _DIFFUSERS_ATTENTION = ".mid.attn_1.", ".mid_block.attentions.0."

Pairs = Iterator[tuple[str, str]]


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a UNet2DConditionModel with this config -> modules in a CompVis file, without the prefix `UNET`."""
    return dict(_unet_pairs(config))


def _unet_pairs(config: Mapping[str, Any]) -> Pairs:
    yield from _UNET_ENDS.items()
    for here, there in ((0, 0), (1, 2)):
        yield from _renamed(f"mid_block.resnets.{here}", f"middle_block.{there}", _UNET_RESNET)
    yield from _unet_down(config)
    yield from _unet_up(config)


def _unet_down(config: Mapping[str, Any]) -> Pairs:
    number, kinds = 1, config["down_block_types"]
    for level, kind in enumerate(kinds):
        for layer in range(config["layers_per_block"]):
            yield from _renamed(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0", _UNET_RESNET)
            if _has_attention(kind):
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level + 1 < len(kinds):
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _unet_up(config: Mapping[str, Any]) -> Pairs:
    number, kinds, num_layers = 0, config["up_block_types"], config["layers_per_block"] + 1
    for level, kind in enumerate(kinds):
        for layer in range(num_layers):
            yield from _renamed(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0", _UNET_RESNET)
            if _has_attention(kind):
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{number}.1"
            if layer + 1 == num_layers and level + 1 < len(kinds):
                upsampler = 2 if _has_attention(kind) else 1
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{upsampler}.conv"
            number += 1


def _has_attention(kind: str) -> bool:
    return kind.startswith("CrossAttn")


def vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of an AutoencoderKL with this config -> modules in a CompVis file, without the prefix `VAE`."""
    return dict(_vae_pairs(len(config["block_out_channels"]), config["layers_per_block"]))


def _vae_pairs(num_levels: int, num_layers: int) -> Pairs:
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for half in ("encoder", "decoder"):
        yield from ((f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out"))
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        for number in (0, 1):
            yield from _renamed(f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}", _VAE_RESNET)
        yield from _renamed(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
    for level in range(num_levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{num_levels - 1 - level}"  # both counted from the image
        for layer in range(num_layers):
            yield from _renamed(f"encoder.down_blocks.{level}.resnets.{layer}", f"{down}.block.{layer}", _VAE_RESNET)
        for layer in range(num_layers + 1):
            yield from _renamed(f"decoder.up_blocks.{level}.resnets.{layer}", f"{up}.block.{layer}", _VAE_RESNET)
        if level + 1 < num_levels:
            yield f"encoder.down_blocks.{level}.downsamplers.0.conv", f"{down}.downsample.conv"
            yield f"decoder.up_blocks.{level}.upsamplers.0.conv", f"{up}.upsample.conv"


def _renamed(here: str, there: str, parts: Mapping[str, str]) -> Pairs:
    return ((f"{here}.{ours}", f"{there}.{theirs}") for ours, theirs in parts.items())


def renamed(names: Iterable[str], modules: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Maps a network's tensor names from diffusers' to a CompVis file's, where they start with `prefix`.

    KeyError if a tensor is in a module that the map `modules` lacks.
    """
    return {name: prefix + _moved(name, modules) for name in names}


def _moved(name: str, modules: Mapping[str, str]) -> str:
    module, rest = name, ""
    while module not in modules:
        module, dot, last = module.rpartition(".")
        if not dot:
            raise KeyError(name)
        rest = f".{last}{rest}"
    return modules[module] + rest


def text_names(names: Iterable[str]) -> dict[str, str]:
    """CLIPTextModel's names, which only some versions of transformers begin with `text_model.` -> names in a file."""
    return {name: TEXT + name.removeprefix("text_model.") for name in names}


def average_name(name: str) -> str:
    """The file's name for the average of the UNet's tensor `name`; a buffer's name cannot have dots.

    `LitEma` in CompVis/stable-diffusion, ldm/modules/ema.py, whose network is the wrapper named `model`.
    """
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def compvis_name(name: str) -> str:
    """CompVis' own spelling of a tensor's name in a CompVis file, whichever tool wrote it."""
    if name.startswith(VAE):
        return _with_leaf(name, _COMPVIS_ATTENTION, _COMPVIS_LEAF)
    rest = name.removeprefix(_TRANSFORMER)
    return TEXT + rest if rest != name and rest.startswith(_TEXT_MODULES) else name


def vae_name(modules: Mapping[str, str]) -> Callable[[str], str | None]:
    """A spelling for `fit`: any tool's name of a VAE's tensor -> diffusers' current one; see `vae_modules`."""
    to_diffusers = {theirs: ours for ours, theirs in modules.items()}

    def spelling(name: str) -> str | None:
        bare = name.removeprefix(VAE)
        if bare.startswith(("loss.", "model_ema.")) or bare in ("epoch", "global_step"):
            return None
        bare = _with_leaf(bare, _COMPVIS_ATTENTION, _COMPVIS_LEAF)
        module, _, last = bare.rpartition(".")
        if module in to_diffusers:
            return f"{to_diffusers[module]}.{last}"
        return _with_leaf(bare, _DIFFUSERS_ATTENTION, _DIFFUSERS_LEAF)

    return spelling


def former_vae_name(name: str) -> str:
    """Diffusers' name for a VAE's tensor before 2023."""
    return _with_leaf(name, _DIFFUSERS_ATTENTION, _FORMER_LEAF)


def text_name(is_nested: bool) -> Callable[[str], str | None]:
    """A spelling for `fit`: any name of a CLIP text encoder's tensor -> its name in this version of transformers.

    `is_nested`: whether the latter begins with `text_model.`.
    """

    def spelling(name: str) -> str | None:
        bare = name.removeprefix(_TRANSFORMER).removeprefix(TEXT_STAGE).removeprefix("text_model.")
        if bare.endswith("embeddings.position_ids") or bare.startswith(
            ("vision_model.", "visual_projection.", "text_projection", "logit_scale")
        ):
            return None
        return f"text_model.{bare}" if is_nested else bare

    return spelling


def checker_name(is_nested: bool) -> Callable[[str], str | None]:
    """Like `text_name`, for the safety checker, whose vision model some versions of transformers nest twice."""

    def spelling(name: str) -> str | None:
        if name.endswith("embeddings.position_ids"):
            return None
        bare = name.removeprefix("vision_model.")
        if bare == name:
            return name
        bare = bare.removeprefix("vision_model.")
        return f"vision_model.vision_model.{bare}" if is_nested else f"vision_model.{bare}"

    return spelling


def _with_leaf(name: str, attention: str, leaves: Mapping[str, str]) -> str:
    module, found, rest = name.partition(attention)
    leaf, dot, last = rest.rpartition(".")
    return f"{module}{found}{leaves.get(leaf, leaf)}{dot}{last}" if found else name
