import http.server
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from filters.heads import (
    AestheticHead,
    SafetyHead,
    WatermarkClassifier,
    load_aesthetic,
    load_aesthetic_v1,
    load_safety,
    load_watermark,
)
from filters.weights import PUBLISHED, Published, cache_dir, digest_of, find_weights, read_state
from sdtrain.errors import UserError

AESTHETIC = Path(__file__).parents[2].parent / "shared" / "data" / "aesthetic"
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


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": _Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt is not a file of weights that is safe to load"):
        read_state(tmp_path / "bad.pt")
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a file of weights"):
        read_state(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), {"epoch": 3}])
def test_a_file_of_something_else_than_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="does not hold tensors by name"):
        read_state(tmp_path / "w.pt")


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="Did you mean 'laion-nsfw-l14'"):
        find_weights("laion-nsfw-b14")


def test_a_seed_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="after 'random:' comes a whole number"):
        digest_of("random:x")


def test_digests_tell_files_by_content_and_random_weights_by_seed(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"a")
    assert digest_of(str(tmp_path / "a.pt")) == sha256(b"a").hexdigest()
    assert digest_of("random:1") != digest_of("random:2") != digest_of(None)


def test_weights_that_cannot_be_fetched_are_named_with_url_and_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    monkeypatch.setitem(PUBLISHED, "far", Published("https://127.0.0.1:1/far.pt", "far.pt"))
    with pytest.raises(UserError) as error:
        find_weights("far")
    assert "https://127.0.0.1:1/far.pt" in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A loopback server that gives b"weights" and counts requests; yields (URL, counts)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"weights")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{server.server_port}/w.pt", asked
    server.shutdown()
    server.server_close()


def test_published_weights_are_fetched_once_and_checked(monkeypatch, published):
    url, asked = published
    monkeypatch.setitem(PUBLISHED, "mine", Published(url, "w.pt", sha256(b"weights").hexdigest()))
    assert find_weights("mine").read_bytes() == b"weights"
    assert find_weights("mine").parent == cache_dir()
    assert len(asked) == 1


def test_other_bytes_than_the_published_ones_are_not_kept(monkeypatch, published):
    url, _ = published
    monkeypatch.setitem(PUBLISHED, "mine", Published(url, "w.pt", sha256(b"others").hexdigest()))
    with pytest.raises(UserError, match="gave other bytes"):
        find_weights("mine")
    assert not (cache_dir() / "w.pt").exists()
