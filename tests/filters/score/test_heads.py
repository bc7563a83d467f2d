from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from filters.score.heads import (
    AestheticHead,
    SafetyHead,
    WatermarkClassifier,
    load_aesthetic,
    load_aesthetic_v1,
    load_safety,
    load_watermark,
)
from filters.score.weights import PUBLISHED, find_weights
from sdtrain.errors import UserError

AESTHETIC = Path(__file__).parents[4] / "shared" / "data" / "aesthetic"
V2, V1 = AESTHETIC / "sac+logos+ava1-l14-linearMSE.pth", AESTHETIC / "sa_0_4_vit_l_14_linear.pth"
# Scores of the ten real embeddings by the published V2 head, run as published.
ORACLE = (1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468)
V1_ORACLE = (-2.4579, -0.1379, 1.8951, 3.5849, 5.0997, 6.4701, 7.7870, 9.0480, 10.2264, 11.3044)

real = pytest.mark.skipif(not AESTHETIC.exists(), reason="the real weights are not beside this checkout")


def layers_of(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """The aesthetic head as published: five linear layers."""
    layers = nn.Sequential()
    for number in (0, 2, 4, 6, 7):
        weight = state[f"layers.{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"layers.{number}.bias"]})
        layers.append(layer)
    return layers.double()


def random_aesthetic_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (768, 1024, 128, 64, 16, 1)
    state = {}
    for number, size_in, size_out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        state[f"layers.{number}.weight"] = torch.randn(size_out, size_in, generator=generator) / size_in**0.5
        state[f"layers.{number}.bias"] = torch.randn(size_out, generator=generator)
    return state


@real
def test_the_published_v2_head_gives_its_known_scores_on_real_embeddings():
    embeddings = np.stack([np.load(AESTHETIC / f"vit_l_14_embeddings/rating{i}.npy").ravel() for i in range(10)])
    scores = load_aesthetic(str(V2))(torch.from_numpy(embeddings).float())
    np.testing.assert_allclose(scores.numpy(), ORACLE, atol=1e-3)


@real
def test_the_known_names_mean_the_published_files(monkeypatch, tmp_path):
    assert PUBLISHED["laion-aesthetic-v2-l14"].sha256 == sha256(V2.read_bytes()).hexdigest()
    assert PUBLISHED["laion-aesthetic-v1-l14"].sha256 == sha256(V1.read_bytes()).hexdigest()
    (tmp_path / V2.name).symlink_to(V2)
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    assert find_weights("laion-aesthetic-v2-l14") == tmp_path / V2.name


@real
def test_the_published_v1_head_gives_its_known_scores_on_real_embeddings():
    embeddings = np.stack([np.load(AESTHETIC / f"vit_l_14_embeddings/rating{i}.npy").ravel() for i in range(10)])
    with torch.inference_mode():
        scores = load_aesthetic_v1(str(V1))(torch.from_numpy(embeddings).float())
    np.testing.assert_allclose(scores.numpy(), V1_ORACLE, atol=1e-3)


@real
def test_weights_of_one_head_are_refused_for_the_other_because_their_scales_differ():
    with pytest.raises(UserError, match=r"V1, whose scale is another; name it in score.aesthetic_v1_weights"):
        load_aesthetic(str(V1))
    with pytest.raises(UserError, match="does not hold the weights of AestheticV1Head"):
        load_aesthetic_v1(str(V2))


def test_the_collapsed_aesthetic_head_equals_its_five_layers():
    state = random_aesthetic_state()
    embeddings = nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(2)), dim=-1)
    expected = layers_of(state)(embeddings.double())[:, 0].detach()
    collapsed = AestheticHead(state)(embeddings).double()
    assert ((collapsed - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-6


def test_the_aesthetic_head_normalises_its_input():
    head = AestheticHead(random_aesthetic_state())
    embeddings = torch.randn(4, 768)
    torch.testing.assert_close(head(embeddings), head(7 * embeddings))


def test_aesthetic_weights_of_another_size_are_refused(tmp_path):
    state = random_aesthetic_state() | {"layers.0.weight": torch.zeros(1024, 512)}
    save_file(state, tmp_path / "b32.safetensors")
    with pytest.raises(UserError, match=r"b32\.safetensors does not hold the aesthetic predictor V2"):
        load_aesthetic(str(tmp_path / "b32.safetensors"))


def test_the_watermark_detector_has_the_published_form_and_reads_both_published_layouts(tmp_path):
    torch.manual_seed(3)
    network = WatermarkClassifier()
    classifier = network.backbone.classifier
    sizes = [(layer.in_features, layer.out_features) for layer in classifier if isinstance(layer, nn.Linear)]
    assert sizes == [(1536, 625), (625, 256), (256, 2)]
    assert [type(layer) for layer in classifier if not isinstance(layer, nn.Linear)] == [nn.ReLU, nn.Dropout, nn.ReLU]
    # The published file names the layers of the bare network.
    state = network.backbone.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"weights": state}, tmp_path / "wrapped.pt")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network.eval()(pixels)
        assert torch.equal(load_watermark(str(tmp_path / "plain.pt"))(pixels), expected)
        assert torch.equal(load_watermark(str(tmp_path / "wrapped.pt"))(pixels), expected)


def test_the_first_class_of_the_watermark_detector_is_the_watermark():
    network = load_watermark("random:0")
    with torch.inference_mode():
        network.backbone.classifier[-1].weight.zero_()
        network.backbone.classifier[-1].bias.copy_(torch.tensor([3.0, 0.0]))
        assert network(torch.randn(2, 3, 64, 64)).tolist() == pytest.approx([1 / (1 + np.exp(-3))] * 2)


def test_random_full_watermark_weights_are_of_the_published_backbone():
    tiny, full = (sum(p.numel() for p in load_watermark(name).parameters()) for name in ("random:0", "random-full:0"))
    assert tiny < 2e6
    assert full > 10e6


def test_the_safety_head_computes_the_published_formula(tmp_path):
    network = SafetyHead()
    generator = torch.Generator().manual_seed(4)
    state = {name: torch.randn(value.shape, generator=generator) / 9 for name, value in network.state_dict().items()}
    state["norm.variance"] = state["norm.variance"].abs()
    torch.save(state, tmp_path / "nsfw.pth")
    embedding = nn.functional.normalize(torch.randn(3, 768, generator=generator), dim=-1)

    hidden = (embedding.double().numpy() - state["norm.mean"].double().numpy()) / (
        np.sqrt(state["norm.variance"].double().numpy()) + 1e-10
    )
    for number in (1, 2, 3, 4):
        weight, bias = (state[f"linear_{number}.{part}"].double().numpy() for part in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
        hidden = np.maximum(hidden, 0) if number < 4 else hidden
    with torch.inference_mode():
        found = load_safety(str(tmp_path / "nsfw.pth"))(embedding)
    np.testing.assert_allclose(found.numpy(), 1 / (1 + np.exp(-hidden[:, 0])), atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors does not hold the weights of SafetyHead"):
        load_safety(str(tmp_path / "other.safetensors"))


def test_random_weights_are_the_same_for_a_seed_and_leave_the_callers_random_numbers_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first, again, other = load_safety("random:1"), load_safety("random:1"), load_safety("random:2")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.linear_1.weight, again.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)
