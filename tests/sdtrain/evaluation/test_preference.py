"""The network of PickScore's form, as its authors use it; random values, narrow."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from sdtrain.demo.text_encoder import build_tokenizer
from sdtrain.errors import UserError
from sdtrain.evaluation.preference import find_preference, preference_digest, preference_scores
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from tests.sdtrain.evaluation.evaluation_fixtures import PROMPTS

NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with the files of `yuvalkirstain/PickScore_v1`."""
    path, tokenizer = tmp_path_factory.mktemp("preference"), build_tokenizer()
    of_text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_act": "gelu"}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    of_images = {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=NARROW | of_text | ends,
        vision_config=NARROW | of_images,
        projection_dim=24,
        logit_scale_init_value=4.6,
    )
    CLIPModel(config).save_pretrained(path, safe_serialization=True)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(path)
    CLIPImageProcessor(**sizes).save_pretrained(path)
    return path


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8)) for _ in PROMPTS]


def of_the_authors(folder, image, prompt):
    """As on the model's page: cosine of the embeddings, times the scale."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    given = {"padding": True, "truncation": True, "max_length": 16, "return_tensors": "pt"}
    with torch.no_grad():
        seen = model.vision_model(**processor(images=image, return_tensors="pt")).pooler_output
        read = model.text_model(**processor(text=prompt, **given)).pooler_output
        one, other = model.visual_projection(seen), model.text_projection(read)
        one, other = one / torch.norm(one, dim=-1, keepdim=True), other / torch.norm(other, dim=-1, keepdim=True)
        return float(model.logit_scale.exp() * (other @ one.T)[0])


def test_scores_are_those_of_the_authors_code_whatever_is_in_the_batch(folder, images):
    prompts = [*PROMPTS[:-1], " ".join(PROMPTS * 3)]  # the last is longer than the network reads
    found = preference_scores(images, prompts, str(folder))
    expected = [of_the_authors(folder, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    assert np.std(expected) > 0.1


def test_a_folder_that_lacks_something_is_a_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        find_preference("./none")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert preference_digest(str(copy)) == preference_digest(str(folder))
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors .*, such as visual_projection\.weight"):
        preference_scores([Image.new("RGB", (8, 8))], ["a"], str(copy))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")  # never unpickled
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        find_preference(str(copy))


def test_a_sweep_measures_it_with_its_spread_and_names_the_network(folder, little, run, tmp_path):
    short = little.model_copy(update={"scales": (1.0,)})
    before = run_sweep(plan(short, [run], tmp_path / "out"), say=lambda line: None)
    assert "preference_score" not in before.metrics
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "samples").rglob("*.tar")}
    protocol = short.model_copy(update={"preference": str(folder)})
    results = run_sweep(plan(protocol, [run], tmp_path / "out"), say=lambda line: None)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn  # nothing is drawn again
    (row,) = results.rows
    assert np.isfinite(row["preference_score"])
    assert row["preference_score_ci95"] > 0
    assert str(folder) in results.metrics["preference_score"]
    assert results.protocol["preference_sha256"] == preference_digest(str(folder))
