import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.config import UNetConfig, load_config
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_digest, vae_scaling_factor
from sdtrain.models.unet import build_unet
from tests.training_fixtures import write_models


def test_default_unet_has_the_parameters_of_sd_v1():
    with torch.device("meta"):
        unet = build_unet(UNetConfig(), 64)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_fresh_unet_predicts_zero_and_its_residual_branches_are_closed():
    unet = build_unet(load_config("tiny").unet, 8)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 16, 64)).sample
    assert (out == 0).all()
    parameters = dict(unet.named_parameters())
    closed = [n for n in parameters if n.startswith("conv_out.") or ".conv2." in n or ".proj_out." in n]
    assert len(closed) > 10
    assert all((parameters[name] == 0).all() for name in closed)
    assert any((p != 0).any() for n, p in parameters.items() if n not in closed and "weight" in n)


def test_digest_depends_on_the_tensors_and_not_on_the_file(tmp_path):
    write_models(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    before = vae_digest(str(tmp_path))
    assert vae_digest(str(tmp_path / "vae")) == before
    tensors = load_file(weights)
    save_file(dict(reversed(tensors.items())), weights, {"written": "again"})
    assert vae_digest(str(tmp_path)) == before
    tensors["encoder.conv_in.bias"][0] += 1
    save_file(tensors, weights)
    assert vae_digest(str(tmp_path)) != before


def test_frozen_networks_load_from_a_folder(tmp_path):
    write_models(tmp_path)
    tokenizer, encoder = load_text_encoder(str(tmp_path))
    assert tokenizer("", padding="max_length").input_ids == [52] + [53] * 15
    assert not encoder.training
    assert not any(p.requires_grad for p in [*encoder.parameters(), *load_vae(str(tmp_path)).parameters()])
    assert vae_scaling_factor(str(tmp_path)) == 0.35


def test_missing_weights_are_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere with a vae"):
        load_vae(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text_encoder"):
        load_text_encoder(str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub did not give it"):
        vae_digest("someone/not-a-model")
