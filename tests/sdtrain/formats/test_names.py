"""The names of SD v1's tensors at full size, on tensors without memory."""

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from sdtrain.errors import UserError
from sdtrain.formats.compvis import stored_weights
from sdtrain.formats.compvis_layout import sd_v1
from sdtrain.formats.names import TEXT, UNET, VAE
from sdtrain.formats.stored_model import FrozenModels, empty_unet, empty_vae

EMA = "model_ema.diffusion_model"


@pytest.fixture(scope="module")
def networks():
    model = sd_v1()
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig.from_dict(dict(model.text_encoder)))
    return empty_unet(model.unet), empty_vae(model.vae), text


@pytest.fixture(scope="module")
def stored(networks):
    unet, vae, text = networks
    state = unet.state_dict()
    return stored_weights(sd_v1(), FrozenModels(vae, None, text), state, state)


@pytest.mark.parametrize(
    ("prefix", "num_tensors", "num_letters"),
    [(UNET, 686, 36_314), (EMA, 686, 32_390), (VAE, 248, 10_149), (TEXT, 196, 8_744)],
)
def test_the_names_and_shapes_are_those_of_public_files(stored, prefix, num_tensors, num_letters):
    """The lists in arenasys/stable-diffusion-webui-model-toolkit, components/*-v1-*.txt, have this many letters."""
    part = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items() if name.startswith(prefix)}
    assert len(part) == num_tensors
    if prefix == TEXT:
        part["embeddings.position_ids"] = (1, 77)
    lines = [f"{name} [{','.join(map(str, shape))}]" for name, shape in sorted(part.items())]
    assert len("\n".join(lines)) == num_letters


def test_diffusers_finds_every_tensor_under_these_names(stored, networks):
    unet, vae, text = networks
    plain = {name: tensor for name, tensor in stored.items() if not name.startswith("model_ema.")}
    agree(convert_ldm_unet_checkpoint(dict(plain), unet.config), unet.state_dict())
    agree(convert_ldm_vae_checkpoint(dict(plain), vae.config), vae.state_dict())
    converted = convert_ldm_clip_checkpoint(dict(plain))
    is_flat = not any(name.startswith("text_model.") for name in text.state_dict())
    agree(
        {name.removeprefix("text_model.") if is_flat else name: t for name, t in converted.items()}, text.state_dict()
    )


def test_diffusers_finds_the_average_too(stored, networks):
    unet = networks[0]
    marked = {
        name: torch.empty(t.shape, dtype=torch.float16 if "_ema" in name else torch.float32, device="meta")
        for name, t in stored.items()
    }
    found = convert_ldm_unet_checkpoint(marked, unet.config, extract_ema=True)
    agree(found, unet.state_dict())
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def agree(found, wanted):
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    assert shapes.keys() == wanted.keys()
    for name, tensor in wanted.items():
        squeezed = tuple(n for n in shapes[name] if n != 1) if ".mid_block.attentions" in name else shapes[name]
        assert squeezed == tuple(tensor.shape), name


def test_another_model_is_named(stored):
    model = sd_v1()
    model.require(stored, "it")
    model.require({*stored, TEXT + "embeddings.position_ids"}, "it")
    with pytest.raises(UserError, match="it is a Stable Diffusion XL, not"):
        model.require(["conditioner.embedders.0.transformer.x", "model.diffusion_model.out.2.bias"], "it")
    with pytest.raises(UserError, match="it is a Stable Diffusion 2, not"):
        model.require(["cond_stage_model.model.ln_final.bias"], "it")
    with pytest.raises(UserError, match="holds one network of a diffusers folder; name the folder"):
        model.require(["down_blocks.0.resnets.0.conv1.bias"], "it")
    with pytest.raises(
        UserError, match=r"of 1130 tensors 1 are missing, and 0 are unknown; .*quant_conv\.bias is miss"
    ):
        model.require(set(stored) - {VAE + "quant_conv.bias"}, "it")
