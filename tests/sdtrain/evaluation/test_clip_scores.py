import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.errors import UserError
from sdtrain.evaluation.metrics import clip_scores
from sdtrain.evaluation.networks import embed_images, embed_texts, features_of
from sdtrain.evaluation.protocol import Protocol
from tests.sdtrain.evaluation.evaluation_fixtures import write_images

CLIP = Protocol(prompts="", reference="", clip_model="ViT-demo", clip_weights="random:0")
TEXTS = ["a red circle", "two dogs on a sofa", "!"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return [Image.open(path) for path in sorted(write_images(tmp_path_factory.mktemp("p") / "p", 3).iterdir())]


def scores(images, texts):
    return clip_scores(embed_images(images, CLIP).numpy(), embed_texts(texts, CLIP)[0].numpy())


def test_scores_are_cosines_and_do_not_depend_on_order_or_company(images):
    together = scores(images, TEXTS)
    assert (abs(together) <= 1).all()
    backwards = scores(images[::-1], TEXTS[::-1])
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-6)
    alone = [scores([image], [text])[0] for image, text in zip(images, TEXTS, strict=True)]
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_equal_embeddings_score_1_and_opposite_ones_minus_1():
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((4, 8))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(clip_scores(unit, unit), 1)
    np.testing.assert_allclose(clip_scores(unit, -unit), -1)


def test_it_is_open_clips_own_way(images):
    """open_clip's transform, encoders and cosine, called as its README does."""
    import open_clip

    from sdtrain.models.clip import load_clip

    network, tokenizer = load_clip("ViT-demo", "random:0")
    transform = open_clip.image_transform(64, is_train=False)
    with torch.no_grad():
        vectors = network.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        texts = network.encode_text(tokenizer(TEXTS), normalize=True)
    np.testing.assert_allclose(scores(images, TEXTS), (vectors * texts).sum(dim=1).numpy(), atol=1e-5)


def test_a_prompt_beyond_77_tokens_is_cut_with_its_end_token_kept_and_counted():
    words = ["dog"] * 75
    fits, cut, longer = " ".join(words), " ".join([*words, "cat"]), " ".join([*words, "cat", "sofa"])
    embeddings, was_cut = embed_texts([fits, cut, longer, "! " * 200, "a"], CLIP)
    assert was_cut.tolist() == [False, True, True, True, False]
    # 77 tokens are a start, 75 words and an end: what follows is not read.
    assert torch.allclose(embeddings[0], embeddings[1], atol=1e-6)
    assert torch.allclose(embeddings[0], embeddings[2], atol=1e-6)
    assert not torch.allclose(embeddings[0], embeddings[4], atol=1e-2)


def test_features_of_the_demo_tell_its_images_apart_and_do_not_depend_on_company(images):
    demo = CLIP.model_copy(update={"networks": ("demo",)})
    together = features_of(images, demo, "demo")
    assert together.shape == (3, 96)
    assert torch.allclose(torch.cat([features_of([image], demo, "demo") for image in images]), together, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_weights_that_are_not_finite_are_a_sentence(images, tmp_path):
    from sdtrain.evaluation.features.inception import load_inception

    state = load_inception("random:0").state_dict()
    state["Mixed_7c.branch1x1.conv.weight"][:] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="features of network 'inception' are not finite"):
        features_of(images[:1], CLIP.model_copy(update={"network_weights": str(tmp_path / "w.pth")}), "inception")
