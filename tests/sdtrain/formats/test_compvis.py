"""Files of the run in CompVis' form: written, read again, and read by diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.models.schedulers import make_scheduler
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks

PROMPTS = ["a red circle", "a blue square"]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def tensors_of(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)["state_dict"]


def test_file_folder_file_changes_nothing(full_file, tensors, tokenizer, tmp_path):
    folder = export_model(full_file, tmp_path / "folder", ExportSettings("both", tokenizer=tokenizer))
    for suffix in ("ckpt", "safetensors"):
        again = tensors_of(export_model(folder, tmp_path / f"again.{suffix}", ExportSettings("both")))
        forgotten = {"model_ema.decay", "model_ema.num_updates"}  # a folder has no place for them
        same(
            {n: t for n, t in again.items() if n not in forgotten},
            {n: t for n, t in tensors.items() if n not in forgotten},
        )
        assert forgotten < again.keys()


def test_file_file_changes_nothing(full_file, tensors, tokenizer, tmp_path):
    settings = ExportSettings("both", tokenizer=tokenizer)
    other = export_model(full_file, tmp_path / "other.safetensors", settings)
    same(tensors_of(other), tensors)
    back = export_model(other, tmp_path / "back.ckpt", settings)
    same(tensors_of(back), tensors)
    assert torch.load(full_file, weights_only=True)["global_step"] == 5


def test_networks_of_a_file_compute_what_the_runs_do(run, full_file, tokenizer):
    generator = torch.Generator().manual_seed(0)
    latents, pixels = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    token_ids, context = torch.arange(2, 34).view(2, 16), torch.randn(2, 16, 64, generator=generator)
    for weights in ("ema", "raw"):
        ours, theirs = (
            load_networks(path, "cpu", torch.float32, weights, tokenizer=tokenizer) for path in (run, full_file)
        )
        with torch.no_grad():
            for call in (
                lambda n: n.unet(latents, torch.tensor([7, 700]), context).sample,
                lambda n: n.vae.encode(pixels).latent_dist.parameters,
                lambda n: n.vae.decode(latents).sample,
                lambda n: n.text_encoder(token_ids).last_hidden_state,
            ):
                assert torch.equal(call(ours), call(theirs))
        assert ours.tokenizer("a red circle").input_ids == theirs.tokenizer("a red circle").input_ids


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_one_kind_of_weights_stands_where_inference_looks(run, tensors, tmp_path, weights, dtype, suffix):
    found = tensors_of(export_model(run, tmp_path / f"model.{suffix}", ExportSettings(weights, dtype)))
    assert found.keys() == {name for name in tensors if not name.startswith("model_ema.")}
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in found.items():
        wanted = tensors[name]
        if name.startswith("model.diffusion_model.") and weights == "ema":
            wanted = tensors["model_ema." + name.removeprefix("model.").replace(".", "")]
        is_weight = name.startswith(("model.", "first_stage_model.")) or name.endswith(("weight", "bias"))
        assert torch.equal(tensor, wanted.to(kept) if is_weight else wanted), name


def test_what_is_no_weight_is_as_in_public_files(tensors):
    others = {n: t for n, t in tensors.items() if not n.startswith(("model.", "first_stage_model.", "model_ema.diff"))}
    others = {name: tensor for name, tensor in others.items() if not name.endswith(("weight", "bias"))}
    positions = others.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert (positions.dtype, positions.shape) == (torch.int64, (1, 16))
    assert others.pop("model_ema.decay") == torch.tensor(0.9)
    assert (others["model_ema.num_updates"].dtype, int(others.pop("model_ema.num_updates"))) == (torch.int32, 5)
    assert len(others) == 12
    assert {(tensor.dtype, tensor.shape) for tensor in others.values()} == {(torch.float32, (1000,))}


def test_the_schedules_buffers_are_those_of_diffusers(tensors):
    theirs = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        variance_type="fixed_small",
        clip_sample=False,
    )
    close = {"rtol": 2e-5, "atol": 1e-7}  # diffusers multiplies them up in float32
    torch.testing.assert_close(tensors["betas"], theirs.betas, **close)
    torch.testing.assert_close(tensors["alphas_cumprod"], theirs.alphas_cumprod, **close)
    for t in (1, 500, 999):
        variance = float(theirs._get_variance(t))
        assert float(tensors["posterior_variance"][t]) == pytest.approx(variance, rel=1e-4)
        assert float(tensors["posterior_log_variance_clipped"][t]) == pytest.approx(np.log(variance), rel=1e-4)
    # A step by formula 7 of DDPM: the latent at the start, then the posterior's mean; both from the buffers alone.
    latent, noise = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), -0.4)
    start = tensors["sqrt_recip_alphas_cumprod"][500] * latent - tensors["sqrt_recipm1_alphas_cumprod"][500] * noise
    mean = tensors["posterior_mean_coef1"][500] * start + tensors["posterior_mean_coef2"][500] * latent
    spread = (0.5 * tensors["posterior_log_variance_clipped"][500]).exp()
    drawn = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    stepped = theirs.step(noise, 500, latent, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(start, stepped.pred_original_sample, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean + spread * drawn, stepped.prev_sample, rtol=1e-4, atol=0)
    alphas = tensors["alphas_cumprod"]
    torch.testing.assert_close(tensors["sqrt_alphas_cumprod"] ** 2, alphas, **close)
    torch.testing.assert_close(tensors["sqrt_one_minus_alphas_cumprod"] ** 2, 1 - alphas, **close)
    torch.testing.assert_close(tensors["log_one_minus_alphas_cumprod"].exp(), 1 - alphas, **close)
    assert torch.equal(tensors["alphas_cumprod_prev"], torch.cat([torch.ones(1), alphas[:-1]]))


@pytest.mark.parametrize("sampler", ["plms", "ddim", "dpm"])
def test_a_sampler_takes_the_same_timesteps_from_a_run_and_from_its_exports(
    run, full_file, tokenizer, tmp_path, sampler
):
    folder = export_model(run, tmp_path / "folder")
    taken = []
    for path in (run, folder, full_file):
        scheduler = make_scheduler(sampler, load_networks(path, "cpu", tokenizer=tokenizer).scheduler_config)
        scheduler.set_timesteps(20)
        taken.append(scheduler.timesteps.tolist())
    assert taken[0] == taken[1] == taken[2]


def test_diffusers_reads_the_file_and_draws_the_images_that_we_draw(run, tokenizer, tmp_path):
    folder = export_model(run, tmp_path / "folder")
    drawn = Sampler(load_networks(run, "cpu", torch.float32)).sample(PROMPTS, [5, 6], SampleSettings(3.0, 20))
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    for suffix in ("ckpt", "safetensors"):
        file = export_model(run, tmp_path / f"model.{suffix}")
        pipeline = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
        same(pipeline.unet.state_dict(), open_model(run).state("ema"))
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(PROMPTS, latents=latents, guidance_scale=3.0, num_inference_steps=20).images
        far = [
            np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() for a, b in zip(drawn, theirs, strict=True)
        ]
        assert max(far) <= 1, far


def test_the_same_model_gives_the_same_bytes(run, tmp_path):
    for suffix in ("ckpt", "safetensors"):
        once, twice = (export_model(run, tmp_path / f"{name}.{suffix}") for name in ("once", "twice"))
        assert once.read_bytes() == twice.read_bytes()


def test_numbers_that_fp16_cannot_hold_are_named(run, tmp_path, monkeypatch):
    state = {name: tensor.clone() for name, tensor in open_model(run).state("ema").items()}
    state["conv_in.weight"][0, 0, 0, 0] = 1e5
    monkeypatch.setattr("sdtrain.formats.stored_model.StoredModel.state", lambda self, weights: dict(state))
    for output in ("model.ckpt", "folder"):
        with pytest.raises(UserError, match=r"(input_blocks\.0\.0|conv_in)\.weight has numbers that fp16 cannot hold"):
            export_model(run, tmp_path / output, ExportSettings(dtype="fp16"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_notes_is_taken_for_the_public_model(run, tmp_path):
    file = export_model(run, tmp_path / "model.ckpt")
    torch.save({"state_dict": tensors_of(file)}, file)
    with pytest.raises(UserError, match=r"model\.ckpt is not a Stable Diffusion v1 in one file: of 1130 tensors"):
        open_model(file)


def test_a_tokenizer_that_does_not_belong_is_refused(run, tmp_path):
    file = export_model(run, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="does not say which tokenizer"):
        load_networks(file, "cpu")
    with pytest.raises(UserError, match=r"'demo' has .* tokens, but the text encoder in .* knows 54"):
        load_networks(file, "cpu", tokenizer="demo")


def test_only_a_part_of_the_average_is_a_sentence(tensors, full_file, tmp_path):
    content = torch.load(full_file, weights_only=True)
    content["state_dict"] = {n: t for n, t in tensors.items() if n != "model_ema.diffusion_modelout2bias"}
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match=r"a part of the averaged weights only: model_ema\.diffusion_modelout2bias"):
        open_model(tmp_path / "part.ckpt")
