import logging

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.models.clip import Preprocess, clip_preprocess, embedding_size, load_clip
from sdtrain.models.weights import clip_digest


def test_the_demos_clip_has_the_embedding_of_vit_l_14_and_quickgelu():
    network, tokenizer = load_clip("ViT-demo", "random:0")
    with torch.inference_mode():
        assert network.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 768)
        assert network.encode_text(tokenizer(["a red circle"])).shape == (1, 768)
    activations = {type(module).__name__ for module in network.modules() if "GELU" in type(module).__name__}
    assert activations == {"QuickGELU"}


@pytest.mark.parametrize(("model", "tag"), [("ViT-L-14", "openai"), ("ViT-L-14", "dfn2b"), ("ViT-B-32", "openai")])
def test_weights_trained_with_quickgelu_are_refused_in_a_model_without(model, tag):
    with pytest.raises(UserError, match=f"need QuickGELU: set clip_model to {model}-quickgelu"):
        load_clip(model, tag)


def test_an_unknown_clip_model_is_named():
    with pytest.raises(UserError, match="knows no model 'ViT-L-15'"):
        load_clip("ViT-L-15", "openai")


def test_clip_weights_are_read_from_a_file(tmp_path):
    network, _ = load_clip("ViT-demo", "random:5")
    save_file(network.state_dict(), tmp_path / "clip.safetensors")
    again, _ = load_clip("ViT-demo", str(tmp_path / "clip.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_clip_weights_of_another_model_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"CLIP ViT-demo with weights .* cannot be loaded"):
        load_clip("ViT-demo", str(tmp_path / "clip.safetensors"))


def test_weights_are_told_apart_by_tag_seed_or_content(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"a")
    assert clip_digest("ViT-L-14", "laion2b_s32b_b82k") == "laion2b_s32b_b82k"
    assert clip_digest("ViT-L-14", "random:3") == "random:3"
    assert len(clip_digest("ViT-L-14", str(tmp_path / "a.pt"))) == 64


def test_a_tokenizer_that_cannot_be_fetched_is_a_sentence(monkeypatch):
    def offline(model):
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(UserError, match=r"cannot be loaded \(no connection\)"):
        load_clip("ViT-demo", "random:0")


def test_retries_of_a_download_say_nothing_beside_the_sentence(monkeypatch, caplog):
    def offline(*arguments, **settings):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise RuntimeError("no connection")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot be loaded \(no connection\)"):
        load_clip("ViT-demo", "random:0")
    assert caplog.records == []


class Network:
    """An open_clip model as far as its images go."""

    def __init__(self, **way):
        usual = {"size": (224, 224), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        self.visual = self
        self.preprocess_cfg = usual | {"interpolation": "bicubic", "resize_mode": "shortest"} | way


OPENAI, HALF = Preprocess(224), Preprocess(224, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("model", "tag", "wanted"),
    [
        ("ViT-L-14-quickgelu", "openai", OPENAI),
        ("ViT-L-14", "laion2b_s32b_b82k", HALF),
        ("ViT-B-16-SigLIP", "webli", Preprocess(224, HALF.mean, HALF.std, squash=True)),
        ("MobileCLIP-B", "datacompdr", Preprocess(224, (0.0,) * 3, (1.0,) * 3, "bilinear")),
    ],
)
def test_published_weights_say_how_they_want_their_images(model, tag, wanted):
    way = open_clip.get_pretrained_cfg(model, tag)
    network = Network(**{n: way[n] for n in ("mean", "std", "interpolation", "resize_mode")})
    assert clip_preprocess(network, model, tag) == wanted
    published = len(
        {str(open_clip.get_pretrained_cfg(model, t)["mean"]) for t in open_clip.list_pretrained_tags_by_model(model)}
    )
    if published == 1:  # then a file of weights of the same model wants its images the same way
        assert clip_preprocess(Network(), model, "/my/finetuned.safetensors") == wanted


def test_a_model_of_ones_own_says_itself():
    network, _ = load_clip("ViT-demo", "random:0")
    assert clip_preprocess(network, "ViT-demo", "random:0") == Preprocess(64)


@pytest.mark.parametrize("way", [{"size": (224, 112)}, {"resize_mode": "longest"}])
def test_a_way_that_we_do_not_have_is_refused(way):
    with pytest.raises(UserError, match="only squares by 'shortest' or 'squash' are made here"):
        clip_preprocess(Network(**way), "ViT-demo", "random:0")


def test_the_size_of_embeddings_is_known_without_weights():
    assert [embedding_size(name) for name in ("ViT-L-14", "ViT-B-32", "ViT-demo")] == [768, 512, 768]


def test_a_tag_of_open_clip_goes_before_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("openai", "mine.pt"):
        (tmp_path / name).write_bytes(b"weights")
    assert clip_digest("ViT-B-32-quickgelu", "openai") == "openai"
    assert clip_digest("ViT-B-32-quickgelu", "./openai") == sha256_of(tmp_path / "openai")
    assert clip_digest("ViT-B-32-quickgelu", "mine.pt") == sha256_of(tmp_path / "mine.pt")
