import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError
from sdtrain.sampling.batch import Job
from sdtrain.sampling.safety import check_images, load_safety_checker
from tests.training_fixtures import write_run

RED, BLUE = Image.new("RGB", (64, 64), (220, 20, 20)), Image.new("RGB", (64, 64), (20, 20, 220))


def write_checker(folder, concept=None, processor=True):
    """A tiny checker of the published one's architecture, which flags what is near `concept` and nothing else."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    network = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=small, projection_dim=16)
    ).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    with torch.no_grad():
        network.visual_projection.weight.normal_()
        network.special_care_embeds_weights.fill_(2.0)  # no cosine reaches that
        network.concept_embeds_weights.fill_(2.0)
        if concept is not None:
            pixels = CLIPImageProcessor(**size)(concept, return_tensors="pt").pixel_values
            network.concept_embeds[3] = network.visual_projection(network.vision_model(pixels)[1])[0]
            network.concept_embeds_weights[3] = 0.99
    network.save_pretrained(folder)
    if processor:
        CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processor", [True, False])
def test_the_checker_flags_what_its_concepts_describe(tmp_path, processor):
    check = load_safety_checker(str(write_checker(tmp_path / "checker", RED, processor)))
    assert check([RED, BLUE, RED]) == [True, False, True]


def test_a_pipelines_checker_is_found_with_its_processor(tmp_path):
    write_checker(tmp_path / "safety_checker", RED, processor=False)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "feature_extractor"
    )
    assert load_safety_checker(str(tmp_path))([BLUE, RED]) == [False, True]


def test_any_function_of_images_can_judge():
    drawn = [(Job("a", 1), RED), (Job("b", 2), BLUE)]

    def check(images):
        return [np.asarray(image)[0, 0, 0] > 100 for image in images]

    black, blue = check_images(drawn, check)
    assert (black.flagged, blue.flagged) == (True, False)
    assert black.image.size == (64, 64)
    assert not np.asarray(black.image).any()
    assert blue.image is BLUE
    refused, _ = check_images(drawn, check, "refuse")
    assert (refused.flagged, refused.image) == (True, None)
    assert [result.image for result in check_images(drawn, None)] == [RED, BLUE]


def test_what_is_no_checker_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nothing with a safety_checker"):
        load_safety_checker(str(tmp_path / "nothing"))
    folder = write_checker(tmp_path / "checker")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="checker is not a safety checker of Stable Diffusion v1"):
        load_safety_checker(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights of a safety_checker: neither model\.safetensors nor"):
        load_safety_checker(str(folder))


def test_another_network_in_its_place_is_a_sentence(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_checker(tmp_path / "checker")
    tensors = load_file(folder / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="concept_embeds is missing"):
        load_safety_checker(str(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), ema_offset=0.02)


def sample(run, output, *options):
    arguments = ["sample", str(run), "a red circle", "a", "--guidance", "2", "--steps", "2", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_blackens_or_leaves_out_what_is_flagged_and_counts_it(run, tmp_path):
    sample(run, tmp_path / "all")
    first = Image.open(tmp_path / "all" / "00000.png")
    checker = ["--safety-checker", str(write_checker(tmp_path / "checker", first))]
    said = sample(run, tmp_path / "black", *checker)
    num = said.count(".png")
    flagged = [path for path in (tmp_path / "black").iterdir() if not np.asarray(Image.open(path)).any()]
    assert num == 2
    assert f"{len(flagged)} of 2 images were flagged by the safety checker and are black" in said
    assert tmp_path / "black" / "00000.png" in flagged
    assert '"flagged": true' in Image.open(flagged[0]).text["sdtrain"]
    sample(run, tmp_path / "refused")  # without a checker all were written
    said = sample(run, tmp_path / "refused", *checker, "--flagged", "refuse")
    assert f"{len(flagged)} of 2 images were flagged by the safety checker and were not written" in said
    assert len(list((tmp_path / "refused").glob("*.png"))) == 2 - len(flagged)
    refusing = [*checker, "--flagged", "refuse", "--keep"]
    assert "0 images drawn, 2 kept" in sample(run, tmp_path / "refused", *refusing), "a refusal is an answer too"
    assert "2 images drawn, 0 kept" in sample(run, tmp_path / "black", *refusing), "a black image is another answer"
    assert len(list((tmp_path / "black").glob("*.png"))) == 2 - len(flagged)
    assert "2 images drawn, 0 kept" in sample(run, tmp_path / "refused", *checker, "--keep")
    assert len(list((tmp_path / "refused").iterdir())) == 2
    said = sample(run, tmp_path / "all", *checker, "--keep")
    assert "2 images drawn, 0 kept" in said, "those that nobody judged are not kept"
    assert "0 images drawn, 2 kept" in sample(run, tmp_path / "all", *checker, "--keep")
    clean = ["--safety-checker", str(write_checker(tmp_path / "harmless"))]
    assert "0 of 2 images were flagged" in sample(run, tmp_path / "clean", *clean)
