"""Local image-to-text models through the stage, beside transformers' own calls, and the similarity of their words."""

import shutil

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from filters.caption.captioner import Captioner, load_captioner, model_digest
from filters.caption.stage import CAPTION
from filters.caption_config import CaptionModelConfig
from filters.recipe_record import record_recipe, with_precision
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from sdtrain.models.clip import clip_preprocess, clip_view, load_clip, normalised, pixels_of
from tests.filters.caption.test_generate import NO_NETWORKS, PER_SHARD, finish_before, recipe_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads
from tests.tiny_captioners import cached, write_blip, write_florence2, write_llava

TINY_CLIP = NO_NETWORKS | {"clip_model": "ViT-demo", "clip_weights": "random:0"}
NUM_IMAGES = 5


def images():
    return [decode_rgb(encoded(scene_image(number))) for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in range(NUM_IMAGES)]
    dataset = write_downloads(tmp_path_factory.mktemp("scored"), rows, PER_SHARD)
    finish_before(dataset, recipe_of({}, score=TINY_CLIP))
    return dataset


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


def captioned(scored, folder, model, **caption):
    dataset = DatasetDir(shutil.copytree(scored.root, folder / "data"))
    recipe = recipe_of(
        {"model": {"name": str(model), "precision": "fp32", "batch_size": 3}, **caption}, score=TINY_CLIP
    )
    run_batch(CAPTION, dataset, recipe, [0, 1])
    return dataset


def rows_of(dataset):
    return [row for shard in (0, 1) for row in pq.read_table(dataset.captions_table(shard)).to_pylist()]


def texts_of(dataset, source):
    return [row["text"] for row in rows_of(dataset) if row["source"] == source]


def by_transformers(folder, text=None):
    """What transformers' own documentation does, one image at a time."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = []
    for image in images():
        inputs = processor(images=image, **({"text": text} if text else {}), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        start = inputs["input_ids"].shape[1] if processor.chat_template else 0
        said.append(processor.decode(tokens[0, start:], skip_special_tokens=True).strip())
    return said


def test_a_model_that_chats_answers_as_transformers_runs_it(scored, llava, tmp_path):
    dataset = captioned(scored, tmp_path, llava, prompts={"short": "describe the image"}, max_tokens=40)
    expected = by_transformers(llava, "user <image> describe the image assistant")
    assert texts_of(dataset, "short") == expected
    assert len(set(expected)) > 1
    described = pq.read_schema(dataset.captions_table(0)).metadata
    assert described[b"sdtrain.caption.model_digest"].decode() == model_digest(CaptionModelConfig(name=str(llava)))


@pytest.mark.parametrize(
    ("write", "prompts", "asked"),
    [
        (write_blip, {}, {"short": None}),
        (write_florence2, {}, {"short": "<CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}),
    ],
    ids=["blip", "florence2"],
)
def test_captioners_have_prompts_of_their_own(scored, tmp_path, write, prompts, asked):
    model = write(tmp_path / "model")
    dataset = captioned(scored, tmp_path, model, prompts=prompts, max_tokens=40, similarity=False)
    for source, text in asked.items():
        assert texts_of(dataset, source) == by_transformers(model, text)


def test_an_answer_that_comes_to_its_limit_is_not_used(scored, llava, tmp_path):
    dataset = captioned(scored, tmp_path, llava, prompts={"short": "describe the image"}, max_tokens=2)
    assert texts_of(dataset, "short") == []
    (note,) = read_entry(dataset, "caption", 0).notes
    assert note == "caption 'short': 4 of 4 answers too_long (cut off at max_tokens, or longer)"


def test_similarity_is_clips_between_image_and_caption(scored, llava, tmp_path):
    dataset = captioned(scored, tmp_path, llava, prompts={"short": "describe the image"}, max_tokens=40)
    network, tokenizer = load_clip("ViT-demo", "random:0")
    preprocess = clip_preprocess(network, "ViT-demo", "random:0")
    views = torch.stack([pixels_of(clip_view(image, preprocess)) for image in images()])
    for source in ("alt", "short"):
        rows = [row for row in rows_of(dataset) if row["source"] == source]
        with torch.inference_mode():
            seen = network.encode_image(normalised(views, preprocess.mean, preprocess.std))
            said = network.encode_text(tokenizer([row["text"] for row in rows]))
        expected = torch.nn.functional.cosine_similarity(seen, said)
        assert [row["similarity"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-3)


def test_stored_embeddings_are_used(scored, llava, tmp_path, monkeypatch):
    from filters.caption import similarity

    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in range(NUM_IMAGES)]
    stored = write_downloads(tmp_path / "stored", rows, PER_SHARD)
    score = TINY_CLIP | {"store_embeddings": True}
    finish_before(stored, recipe_of({}, score=score))
    model = {"name": str(llava), "precision": "fp32", "batch_size": 3}
    recipe = recipe_of({"model": model, "prompts": {"short": "describe the image"}, "max_tokens": 40}, score=score)
    with monkeypatch.context() as patched:
        patched.setattr(similarity, "shard_images", None)  # read for the captioner alone
        run_batch(CAPTION, stored, recipe, [0, 1])
    again = captioned(scored, tmp_path, llava, prompts={"short": "describe the image"}, max_tokens=40)
    found, expected = ([row["similarity"] for row in rows_of(dataset)] for dataset in (stored, again))
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_model_on_the_hub_has_the_digest_of_the_same_folder(llava, tmp_path, monkeypatch):
    cached(tmp_path / "hub", "tiny/captioner", lambda folder: shutil.copytree(llava, folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model_digest.cache_clear()
    named = CaptionModelConfig(name="tiny/captioner")
    assert model_digest(named) == model_digest(CaptionModelConfig(name=str(llava)))
    assert isinstance(load_captioner(named), Captioner)
    with pytest.raises(UserError, match="the hub did not give it"):
        model_digest(CaptionModelConfig(name="tiny/captioner", revision="other"))


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"caption\.model\.name: the folder .* holds no model"):
        load_captioner(CaptionModelConfig(name=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="cannot be loaded as a model that turns an image"):
        load_captioner(CaptionModelConfig(name=str(tmp_path)))


def test_the_dataset_keeps_the_precision_that_was_chosen(scored, llava, tmp_path):
    dataset = DatasetDir(shutil.copytree(scored.root, tmp_path / "data"))
    begun = recipe_of({"model": {"name": str(llava), "precision": "bf16"}})
    record_recipe(dataset, begun)
    again = with_precision(dataset, recipe_of({"model": {"name": str(llava)}}))
    assert again.caption.model.precision == "bf16"
