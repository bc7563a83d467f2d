import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import Dinov2Config, Dinov2Model

from sdtrain.errors import UserError
from sdtrain.evaluation.features.dinov2 import NARROW, VIT_L, dinov2_view, load_dinov2, make_dinov2, resample_positions


def published_names(depth):
    """Names in dinov2_vitl14_pretrain.pth: the state dict of hubconf's network, with its blocks in one chunk."""
    both = ("weight", "bias")
    modules = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"{module}.{kind}" for module in modules for kind in both] + ["ls1.gamma", "ls2.gamma"]
    names = {"cls_token", "pos_embed", "mask_token", *(f"patch_embed.proj.{kind}" for kind in both)}
    return names | {f"norm.{kind}" for kind in both} | {f"blocks.{n}.{name}" for n in range(depth) for name in block}


@pytest.fixture(scope="module")
def state():
    """Random tensors as in the published file, narrow."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in make_dinov2(NARROW).state_dict().items()}
    shapes |= {"pos_embed": (1, 1370, NARROW.width), "mask_token": (1, NARROW.width)}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vitl14_pretrain.pth"
    torch.save(state, path)
    return str(path)


def test_the_graph_has_the_names_and_shapes_of_the_published_file(state):
    """304,368,640 parameters, as the publishers count (300 M), with positions for 518 pixels."""
    with torch.device("meta"):
        full = make_dinov2(VIT_L).state_dict()
    assert set(full) | {"mask_token"} == published_names(24)
    assert set(state) == published_names(NARROW.depth)
    assert full["blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert full["blocks.23.mlp.fc1.weight"].shape == (4096, 1024)
    assert full["patch_embed.proj.weight"].shape == (1024, 3, 14, 14)
    assert full["blocks.0.ls1.gamma"].shape == (1024,)
    num = sum(tensor.numel() for tensor in full.values()) + (1370 - 257) * 1024 + 1024
    assert num == 304_368_640


def in_transformers(state):
    """Their network of the same weights, whose positions are made for 224 pixels."""
    config = Dinov2Config(
        hidden_size=NARROW.width, num_hidden_layers=NARROW.depth, num_attention_heads=NARROW.num_heads,
        image_size=224, patch_size=14, layerscale_value=1.0,
    )  # fmt: skip
    theirs = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": resample_positions(state["pos_embed"]),
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for n in range(NARROW.depth):
        ours, block = f"blocks.{n}", f"encoder.layer.{n}"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                theirs[f"{block}.attention.{name}_proj.{kind}"] = part
            theirs[f"{block}.attention.o_proj.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{block}.{name}.{kind}"] = state[f"{ours}.{name}.{kind}"]
        for number in (1, 2):
            theirs[f"{block}.layer_scale{number}.lambda1"] = state[f"{ours}.ls{number}.gamma"]
    network = Dinov2Model(config).eval()
    network.load_state_dict(theirs)
    return network


def test_features_are_those_of_transformers_network_with_the_same_weights(state, file):
    views = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = load_dinov2(file, NARROW)(views), in_transformers(state)(views).pooler_output
    assert ours.shape == (2, NARROW.width)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std(dim=0).min() > 0


def cubic(distance):
    """Keys' kernel with a = -0.75, of which PyTorch's bicubic takes four taps."""
    distance = abs(distance)
    if distance < 1:
        return 1.25 * distance**3 - 2.25 * distance**2 + 1
    return -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)


def test_positions_are_interpolated_with_the_published_offset():
    """Position i of 16 is taken at (i + 0.5) * 37 / 16.1 - 0.5; without the 0.1 another place would be."""
    weights = np.zeros((16, 37))
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, np.clip(tap, 0, 36)] += cubic(place - tap)
    positions = torch.randn(1, 1370, 3, generator=torch.Generator().manual_seed(2))
    grid = positions[0, 1:].reshape(37, 37, 3).double().numpy()
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, grid).reshape(256, 3)
    found = resample_positions(positions)[0]
    assert torch.equal(found[0], positions[0, 0])
    assert np.allclose(found[1:].numpy(), expected, atol=1e-5)


def test_the_view_is_that_of_stein_et_al():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    resize = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC)
    theirs = v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    assert torch.allclose(dinov2_view(image), theirs(image), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"register_tokens": torch.zeros(1, 4, 128)}, "it has register_tokens"),
        ({"norm.bias": None}, r"it lacks norm\.bias"),
        ({"pos_embed": torch.zeros(1, 257, 128)}, r"pos_embed has shape \(1, 257, 128\)"),
    ],
)
def test_another_network_is_a_sentence(state, tmp_path, change, sentence):
    changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    torch.save(changed, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"is no DINOv2 ViT-L/14: {sentence}"):
        load_dinov2(str(tmp_path / "w.pth"), NARROW)


def test_a_narrow_file_is_not_taken_for_the_published_one(file):
    with pytest.raises(UserError, match="is no DINOv2 ViT-L/14"):
        load_dinov2(file)


class Program:
    """Would be run by unpickling."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_but_tensors_is_unpickled_and_no_hub_is_asked(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("torch.hub.load", None)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"dinov2_vitl14_pretrain\.pth elsewhere and put it there, or .*--dinov2-weights"
    ):
        load_dinov2("dinov2-vitl14")
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"weights": Program()}, protocol=2))
    with pytest.raises(UserError, match="not a file of weights that is safe to load"):
        load_dinov2(str(tmp_path / "w.pth"))
