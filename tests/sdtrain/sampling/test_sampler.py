import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from sdtrain.config.sections import SpeedConfig
from sdtrain.errors import UserError
from sdtrain.models.schedulers import make_scheduler
from sdtrain.precision import decoder_dtype
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks, make_grid
from tests.sdtrain.sampling.random_pipeline import write_random

PROMPTS = ["a red circle", "a blue square", "a green circle"]


def calls_of(sampler, **settings):
    sizes = []
    hook = sampler._networks.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sampler.sample(PROMPTS, [1, 2, 3], SampleSettings(**settings))
    hook.remove()
    return sizes


def test_fifty_plms_steps_are_51_calls_on_both_halves_at_once(sampler):
    assert calls_of(sampler) == [6] * 51


def test_guidance_one_skips_the_unconditional_half(sampler):
    assert calls_of(sampler, guidance_scale=1.0, num_steps=4) == [3] * 5


def test_images_are_those_of_the_diffusers_pipeline(sampler, folder):
    assert_images_agree(sampler, StableDiffusionPipeline.from_pretrained(folder))


@pytest.mark.parametrize(("zero_terminal_snr", "scheduler"), [(False, "PNDMScheduler"), (True, "DDIMScheduler")])
def test_a_velocity_models_export_gives_the_same_images_here_and_in_diffusers(tmp_path, zero_terminal_snr, scheduler):
    folder = write_random(tmp_path, prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (written["_class_name"], written["prediction_type"]) == (scheduler, "v_prediction")
    sampler = Sampler(load_networks(folder, "cpu", torch.float32))
    assert_images_agree(sampler, StableDiffusionPipeline.from_pretrained(folder))


def assert_images_agree(sampler, pipeline, name=None):
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6, 7)])
    theirs = pipeline(PROMPTS, latents=latents, guidance_scale=3.0, num_inference_steps=20).images
    ours = sampler.sample(PROMPTS, [5, 6, 7], SampleSettings(guidance_scale=3.0, num_steps=20, sampler=name))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 2
    assert not np.array_equal(np.asarray(ours[0]), np.asarray(ours[1]))


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_other_samplers_are_diffusers_own(sampler, folder, name):
    theirs = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[name]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    options = {"clip_sample": False} if name == "ddim" else {}
    pipeline.scheduler = theirs.from_config(pipeline.scheduler.config, **options)
    assert_images_agree(sampler, pipeline, name)


def test_plms_cannot_begin_at_pure_noise():
    with pytest.raises(UserError, match="ddim or dpm"):
        make_scheduler("plms", {"rescale_betas_zero_snr": True})


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match=r"num_steps \(0\)"):
        SampleSettings(num_steps=0)


def test_an_image_does_not_depend_on_its_batch(sampler):
    together = sampler.sample(PROMPTS, [1, 2, 3], SampleSettings(num_steps=5))
    apart = sampler.sample(PROMPTS, [1, 2, 3], SampleSettings(num_steps=5, batch_size=1))
    for a, b in zip(together, apart, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


class Graph:
    """A UNet as a CUDA graph replays it: every pass leaves its output in the same memory, once it was marked."""

    def __init__(self, unet, monkeypatch):
        self._unet, self._memory, self._is_marked = unet, None, False
        self.sizes = []
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self._mark)

    def _mark(self):
        self._is_marked = True
        if self._memory is not None:
            self._memory.fill_(float("nan"))

    def __call__(self, latents, timesteps, context):
        assert self._is_marked, "a pass that is not marked runs while the last one's results count as in use"
        self.sizes.append((len(latents), len(timesteps), len(context)))
        predicted = self._unet(latents, timesteps, context).sample
        self._memory = torch.empty_like(predicted) if self._memory is None else self._memory
        self._memory.copy_(predicted)
        self._is_marked = False
        return SimpleNamespace(sample=self._memory)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize(("num_rows", "size"), [(0, None), (4, 4), (1, 1), (16, 16)])
def test_a_graph_gets_batches_of_one_size_and_marks_and_loses_nothing(
    sampler, monkeypatch, guidance_scale, num_rows, size
):
    settings = SampleSettings(guidance_scale, num_steps=3, batch_size=2)
    plain = sampler.sample(PROMPTS, [1, 2, 3], settings)
    graph, speed = Graph(sampler._networks.unet, monkeypatch), SpeedConfig(compile="whole", compile_mode="max-autotune")
    networks = replace(sampler._networks, unet=graph, speed=speed, num_rows=num_rows)
    filled = Sampler(networks).sample(PROMPTS, [1, 2, 3], settings)
    first = 2 if guidance_scale == 1 else 4
    assert set(graph.sizes) == {(size or first,) * 3}
    for a, b in zip(plain, filled, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_the_vae_decodes_in_the_networks_bf16_on_a_gpu_only(sampler, folder):
    assert decoder_dtype(torch.bfloat16, "cuda:1") is torch.bfloat16
    assert {decoder_dtype(dtype, "cuda") for dtype in (torch.float16, torch.float32)} == {torch.float32}
    assert load_networks(folder, "cpu", torch.bfloat16).vae.dtype == torch.float32
    half = Sampler(load_networks(folder, "cpu", torch.float32, vae_dtype=torch.bfloat16))
    assert half._networks.vae.dtype == torch.bfloat16
    settings = SampleSettings(num_steps=3)
    for a, b in zip(
        sampler.sample(PROMPTS, [1, 2, 3], settings), half.sample(PROMPTS, [1, 2, 3], settings), strict=True
    ):
        difference = np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))
        assert 0 < difference.max() <= 8


def test_many_images_are_decoded_in_parts(sampler, monkeypatch):
    whole = sampler.sample(PROMPTS, [1, 2, 3], SampleSettings(num_steps=2))
    monkeypatch.setattr("sdtrain.sampling.sampler._DECODED_AT_ONCE", 2)
    parts = sampler.sample(PROMPTS, [1, 2, 3], SampleSettings(num_steps=2))
    assert len(parts) == 3
    for a, b in zip(whole, parts, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_seeds_and_prompts_must_pair_up(sampler):
    with pytest.raises(UserError, match="3 prompts and 1 seeds"):
        sampler.sample(PROMPTS, [1])


def test_a_broken_model_is_a_sentence(folder):
    broken = Sampler(load_networks(folder, "cpu", torch.float32))
    with torch.no_grad():
        broken._networks.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        broken.sample(["a"], [1], SampleSettings(num_steps=2))


def test_a_vae_that_gives_no_numbers_is_named(folder):
    broken = Sampler(load_networks(folder))
    with torch.no_grad():
        broken._networks.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=f"The VAE of {folder} gives images that are not finite"):
        broken.sample(["a"], [0], SampleSettings(num_steps=1))


def test_a_folder_without_a_pipeline_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="neither a diffusers folder"):
        Sampler(load_networks(tmp_path))


def test_grid_places_images_row_by_row():
    images = [Image.new("RGB", (10, 8), color) for color in ("red", "lime", "blue")]
    grid = make_grid(images, columns=2, gap_px=1)
    assert grid.size == (23, 19)
    corners = [grid.getpixel(place) for place in ((1, 1), (12, 1), (1, 10), (12, 10))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
