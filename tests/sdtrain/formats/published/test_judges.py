"""The networks that judge images, as their files are published: LAION's heads, CLIP, and the Inception of FID."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from filters.score.heads import load_aesthetic, load_aesthetic_v1, load_safety, load_watermark
from sdtrain.errors import UserError
from sdtrain.evaluation.features.inception import load_inception
from sdtrain.models.clip import load_clip


def linear(name, size_in, size_out):
    return {f"{name}.weight": torch.randn(size_out, size_in) / size_in**0.5, f"{name}.bias": torch.randn(size_out)}


def aesthetic_v2():
    sizes = (768, 1024, 128, 64, 16, 1)
    layers = zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)
    return {name: t for n, a, b in layers for name, t in linear(f"layers.{n}", a, b).items()}


def aesthetic_v1():
    return {name.removeprefix("x."): tensor for name, tensor in linear("x", 768, 1).items()}


def nsfw():
    state = {"norm.mean": torch.randn(768), "norm.variance": torch.rand(768)}
    for number, (a, b) in enumerate(((768, 64), (64, 512), (512, 256), (256, 1)), 1):
        state |= linear(f"linear_{number}", a, b)
    return state


@pytest.mark.parametrize(
    ("make", "load", "file"),
    [
        (aesthetic_v2, load_aesthetic, "sac+logos+ava1-l14-linearMSE.pth"),
        (aesthetic_v1, load_aesthetic_v1, "sa_0_4_vit_l_14_linear.pth"),
        (nsfw, load_safety, "clip_ViT-L-14_openai_binary_nsfw_head.pth"),
    ],
)
def test_laions_heads_load_and_judge_embeddings(tmp_path, make, load, file):
    torch.manual_seed(0)
    state = make()
    for dtype in (torch.float32, torch.float16):
        torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / file)
        with torch.inference_mode():
            scores = load(str(tmp_path / file))(torch.randn(3, 768))
        assert (scores.shape, scores.dtype, bool(scores.isfinite().all())) == ((3,), torch.float32, True)


def test_the_watermark_detector_loads_with_the_names_of_its_file(tmp_path):
    state = load_watermark("random-full:0").backbone.state_dict()
    assert {"conv_stem.weight", "bn1.num_batches_tracked", "blocks.0.0.conv_dw.weight", "classifier.5.bias"} <= set(
        state
    )
    torch.save(state, tmp_path / "watermark_model_v1.pt")
    loaded = load_watermark(str(tmp_path / "watermark_model_v1.pt"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.backbone.state_dict().items())


def openai_names(layers=24):
    """Names of OpenAI's ViT-L/14, of which open_clip's file is a copy."""
    both = ("weight", "bias")
    modules = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    block = [f"{module}.{kind}" for module in modules for kind in both]
    block += ["attn.in_proj_weight", "attn.in_proj_bias"]
    names = {"text_projection", "logit_scale", "token_embedding.weight", "positional_embedding"}
    names |= {f"ln_final.{kind}" for kind in both}
    names |= {"visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight"}
    names |= {f"visual.ln_{at}.{kind}" for at in ("pre", "post") for kind in ("weight", "bias")}
    names |= {f"transformer.resblocks.{n}.{name}" for n in range(12) for name in block}
    return names | {f"visual.transformer.resblocks.{n}.{name}" for n in range(layers) for name in block}


def test_open_clips_vit_l_14_has_the_published_names_and_shapes():
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-L-14-quickgelu")
        network = open_clip.CLIP(**config)
    state = network.state_dict()
    assert set(state) - {"attn_mask"} == openai_names()
    assert state["visual.proj"].shape == (1024, 768)
    assert state["text_projection"].shape == (768, 768)
    assert state["token_embedding.weight"].shape == (49408, 768)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_clip_loads_from_a_file_of_halves(tmp_path, suffix):
    """Narrow, with the names that OpenAI gave; the published weights are fp16, the network is not."""
    network, _ = load_clip("ViT-demo", "random:5")
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    assert {name for name in state if "resblocks" not in name} == {n for n in openai_names() if "resblocks" not in n}
    path = tmp_path / f"open_clip_model.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    again, _ = load_clip("ViT-demo", str(path))
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in again.state_dict().items())


def test_openais_program_is_refused_in_a_sentence_that_names_the_file_to_take(tmp_path):
    """Their ViT-L-14.pt is a program for TorchScript: to read it is to trust it."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-L-14.pt")
    with pytest.raises(UserError, match=r"ViT-L-14\.pt is a program .*open_clip_model\.safetensors"):
        load_clip("ViT-demo", str(tmp_path / "ViT-L-14.pt"))


def test_fids_inception_loads_with_the_published_names(tmp_path):
    network = load_inception("random:0")
    state = network.state_dict()
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var", "fc.bias"} <= set(state)
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    loaded = load_inception(str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
