import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.errors import UserError
from sdtrain.evaluation.metrics import clip_scores
from sdtrain.evaluation.networks import embed_pictures, embed_texts, features_of, shown_by
from sdtrain.evaluation.protocol import Protocol
from tests.sdtrain.evaluation.evaluation_fixtures import write_pictures

CLIP = Protocol(prompts="", reference="", clip_model="ViT-demo", clip_weights="random:0")
TEXTS = ["a red circle", "two dogs on a sofa", "!"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return [Image.open(path) for path in sorted(write_pictures(tmp_path_factory.mktemp("p") / "p", 3).iterdir())]


def scores(pictures, texts):
    return clip_scores(embed_pictures(pictures, CLIP).numpy(), embed_texts(texts, CLIP)[0].numpy())


def test_scores_are_cosines_and_do_not_depend_on_order_or_company(pictures):
    together = scores(pictures, TEXTS)
    assert (abs(together) <= 1).all()
    backwards = scores(pictures[::-1], TEXTS[::-1])
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-6)
    alone = [scores([picture], [text])[0] for picture, text in zip(pictures, TEXTS, strict=True)]
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_equal_embeddings_score_1_and_opposite_ones_minus_1():
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((4, 8))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(clip_scores(unit, unit), 1)
    np.testing.assert_allclose(clip_scores(unit, -unit), -1)


def test_it_is_open_clips_own_way(pictures):
    """open_clip's transform, encoders and cosine, called as its README does."""
    import open_clip

    from sdtrain.models.clip import load_clip

    network, tokenizer = load_clip("ViT-demo", "random:0")
    transform = open_clip.image_transform(64, is_train=False)
    with torch.no_grad():
        images = network.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
        texts = network.encode_text(tokenizer(TEXTS), normalize=True)
    np.testing.assert_allclose(scores(pictures, TEXTS), (images * texts).sum(dim=1).numpy(), atol=1e-5)


def test_a_prompt_beyond_77_tokens_is_cut_with_its_end_token_kept_and_counted():
    words = ["dog"] * 75
    fits, cut, longer = " ".join(words), " ".join([*words, "cat"]), " ".join([*words, "cat", "sofa"])
    embeddings, was_cut = embed_texts([fits, cut, longer, "! " * 200, "a"], CLIP)
    assert was_cut.tolist() == [False, True, True, True, False]
    # 77 tokens are a start, 75 words and an end: what follows is not read.
    assert torch.allclose(embeddings[0], embeddings[1], atol=1e-6)
    assert torch.allclose(embeddings[0], embeddings[2], atol=1e-6)
    assert not torch.allclose(embeddings[0], embeddings[4], atol=1e-2)


def test_the_demos_checker_counts_colours_and_shapes_and_says_which_prompt_it_cannot_judge():
    from sdtrain.demo.pictures import draw, random_scene

    scene = random_scene(np.random.default_rng(0), "red", "circle")
    picture = draw(scene, 64, 64)
    found = shown_by([picture] * 4, ["a red circle", "a blue circle", "a red star", "a blue star, plain background"])
    assert found.tolist() == [1, 0.5, 0.5, 0]
    with pytest.raises(UserError, match="'two dogs' lacks one"):
        shown_by([picture], ["two dogs"])


def test_features_of_the_demo_tell_its_pictures_apart_and_do_not_depend_on_company(pictures):
    demo = CLIP.model_copy(update={"network": "demo"})
    together = features_of(pictures, demo)
    assert together.shape == (3, 96)
    assert torch.allclose(torch.cat([features_of([picture], demo) for picture in pictures]), together, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_weights_that_are_not_finite_are_a_sentence(pictures, tmp_path):
    from sdtrain.evaluation.inception import load_inception

    state = load_inception("random:0").state_dict()
    state["Mixed_7c.branch1x1.conv.weight"][:] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="features of network 'inception' are not finite"):
        features_of(pictures[:1], CLIP.model_copy(update={"network_weights": str(tmp_path / "w.pth")}))
