"""Sizes, negative prompts and image-to-image, against diffusers' pipelines with the same noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from sdtrain.errors import UserError
from sdtrain.sampling.sampler import Sampler, SampleSettings
from sdtrain.sampling.start_image import open_start_image

PROMPTS, SEEDS = ["a red circle", "a blue square"], [5, 6]
WIDTH, HEIGHT = 72, 40


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """An image file that is neither of the model's size nor of its shape."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC).save(path)
    return path


def pipeline_of(folder, kind, name):
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    schedulers = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
    if name in schedulers:
        options = {"clip_sample": False} if name == "ddim" else {}
        pipeline.scheduler = schedulers[name].from_config(pipeline.scheduler.config, **options)
    return pipeline


def assert_alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == b.size
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 2


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("name", ["plms", "ddim", "dpm"])
def test_size_and_negative_prompt_are_those_of_diffusers(sampler, folder, name):
    settings = SampleSettings(3.0, 10, name, negative_prompt="a green star", width=WIDTH, height=HEIGHT)
    ours = sampler.sample(PROMPTS, SEEDS, settings)
    latents = torch.cat([torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=generator) for generator in generators()])
    options = {"negative_prompt": ["a green star"] * 2, "guidance_scale": 3.0, "num_inference_steps": 10}
    theirs = pipeline_of(folder, StableDiffusionPipeline, name)(PROMPTS, latents=latents, **options).images
    assert ours[0].size == (WIDTH, HEIGHT)
    assert_alike(ours, theirs)
    plain = sampler.sample(PROMPTS, SEEDS, SampleSettings(3.0, 10, name, width=WIDTH, height=HEIGHT))
    assert plain[0].tobytes() != ours[0].tobytes()


# Diffusers asks PLMS' second timestep twice wherever it begins, and then begins in the middle of that Heun step; only
# whole walks agree. test_plms.py has the formulas for the others.
@pytest.mark.parametrize(
    ("name", "strength", "size"),
    [
        ("ddim", 0.1, (64, 64)),
        ("ddim", 0.5, (WIDTH, HEIGHT)),
        ("ddim", 0.75, (64, 64)),
        ("dpm", 0.5, (WIDTH, HEIGHT)),
        ("dpm", 1.0, (64, 64)),
        ("plms", 1.0, (WIDTH, HEIGHT)),
    ],
)
def test_images_from_images_are_those_of_diffusers(sampler, folder, photo, name, strength, size):
    start = open_start_image(photo, strength)
    settings = SampleSettings(3.0, 10, name, 16, "a green star", *size, start)
    ours = sampler.sample(PROMPTS, SEEDS, settings)
    options = {"negative_prompt": ["a green star"] * 2, "guidance_scale": 3.0, "num_inference_steps": 10}
    image = Image.fromarray(start.pixels(*size))
    theirs = pipeline_of(folder, StableDiffusionImg2ImgPipeline, name)(
        PROMPTS, image=[image] * 2, strength=strength, generator=generators(), **options
    ).images
    assert_alike(ours, theirs)


@pytest.mark.parametrize("name", ["plms", "dpm"])
def test_a_start_image_stays_at_little_strength_and_goes_at_full(sampler, photo, name):
    latents = sampler._start_latents(open_start_image(photo), generators(), SampleSettings())
    decoded = np.asarray(sampler._decode(latents))

    def distance(strength):
        start = open_start_image(photo, strength)
        drawn = sampler.sample(PROMPTS, SEEDS, SampleSettings(1.0, 10, name, start=start))
        return np.abs(np.asarray(drawn, np.int16) - decoded).mean()

    distances = [distance(strength) for strength in (0.1, 0.4, 1.0)]
    assert distances == sorted(distances)


def test_an_image_from_an_image_depends_on_its_own_seed_only(sampler, photo):
    settings = SampleSettings(3.0, 8, start=open_start_image(photo))
    together = sampler.sample(PROMPTS, SEEDS, settings)
    assert_alike(sampler.sample(PROMPTS[1:], SEEDS[1:], settings), together[1:])
    other = sampler.sample(PROMPTS[1:], [7], settings)
    assert other[0].tobytes() != together[1].tobytes()


def test_a_start_image_is_turned_upright_and_cropped_at_its_centre(tmp_path):
    halves = Image.new("RGB", (100, 50), "red")
    halves.paste("blue", (50, 0, 100, 50))
    exif = halves.getexif()
    exif[0x0112] = 6  # the image is stored turned to the left
    halves.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = open_start_image(tmp_path / "turned.jpg").pixels(16, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels[0, 0, 0] > 200  # red above, blue below
    assert pixels[15, 15, 2] > 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 100}, "width 100 has to be a multiple of 8; 96 and 104 are the nearest"),
        ({"height": 4}, "height 4 has to be a multiple of 8; 8 is the smallest"),
        ({"guidance_scale": 1.0, "negative_prompt": "a"}, "no effect at guidance scale 1"),
        ({"strength": 1.5}, "strength 1.5 is out of range"),
        ({"strength": 0.01, "num_steps": 50}, "leaves none to take; it has to be 0.02 at least"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(photo, settings, words):
    strength = settings.pop("strength", None)
    start = {"start": open_start_image(photo, strength)} if strength else {}
    with pytest.raises(UserError, match=words):
        SampleSettings(**settings, **start)


def test_a_start_image_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no image"):
        open_start_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png is no image that can be read"):
        open_start_image(tmp_path / "text.png")


def test_a_models_own_size_may_be_no_square(sampler):
    wide = Sampler(replace(sampler._networks, latent_size=[HEIGHT // 8, WIDTH // 8]))
    plain = wide.sample(PROMPTS, SEEDS, SampleSettings(num_steps=2))
    assert_alike(plain, sampler.sample(PROMPTS, SEEDS, SampleSettings(num_steps=2, width=WIDTH, height=HEIGHT)))
