import csv
import json
from concurrent.futures import Future
from dataclasses import replace
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdtrain import precision
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.terminal_progress import run_with_bar
from sdtrain.errors import UserError
from sdtrain.evaluation import stages
from sdtrain.evaluation.models import identify, run_of
from sdtrain.evaluation.networks import features_of
from sdtrain.evaluation.results import read_results
from sdtrain.evaluation.stages import read_images
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import _completed_reports, run_sweep
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.formats.digests import vae_digest
from sdtrain.formats.export import export_model
from sdtrain.precision import Speedup
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from tests.sdtrain.evaluation.evaluation_fixtures import PROMPTS, digests, write_images


def quiet(line):
    pass


def all_images(sweep, scale="guidance-3"):
    folder = sweep.directory.root / "samples" / sweep.models[0].key / scale
    return [image for tar in sorted(folder.glob("*.tar")) for image in read_images(tar)[0]]


@pytest.fixture
def done(little, run, tmp_path):
    """An evaluation that has been run."""
    sweep = plan(little, [run], tmp_path / "out")
    return SimpleNamespace(sweep=sweep, results=run_sweep(sweep, say=quiet), folder=tmp_path / "out")


def test_the_results_hold_a_row_a_scale_with_spreads_and_the_whole_protocol(done):
    written = json.loads((done.folder / "results.json").read_text())
    assert [row["guidance_scale"] for row in written["rows"]] == [1.0, 3.0]
    of_features = {f"{name}_demo_features" for name in ("fid", "kid", "precision", "recall", "density", "coverage")}
    assert set(written["metrics"]) == of_features | {"agreement_demo_checker"}
    for row in written["rows"]:
        assert row["num_images"] == 6
        for name in written["metrics"]:
            assert np.isfinite(row[name])
            assert np.isfinite(row[f"{name}_ci95" if not name.startswith("kid") else f"{name}_std"])
    wanted = {"num_steps", "sampler", "seed", "weights", "dtype", "resize", "size_px", "reference_sha256"}
    assert wanted | {"networks_sha256", "prompts_sha256", "models"} <= set(written["protocol"])
    assert "Only 6 images were drawn and 12 real images were taken for 96 features" in written["notes"][0]
    assert read_results(done.folder / "results.json") == done.results
    former = (done.folder / "results.json").read_text().replace('"num_images"', '"num_pictures"')
    (done.folder / "former.json").write_text(former)
    assert read_results(done.folder / "former.json") == done.results
    content = json.loads(former)
    (network,), digests = content["protocol"].pop("networks"), content["protocol"].pop("networks_sha256")
    content["protocol"] |= {"network": network, "network_sha256": digests[network]}  # when there was one
    (done.folder / "former.json").write_text(json.dumps(content))
    assert read_results(done.folder / "former.json") == done.results
    with (done.folder / "results.csv").open() as file:
        assert [float(row["guidance_scale"]) for row in csv.DictReader(file)] == [1.0, 3.0]
    assert Image.open(done.folder / "curve.png").width > 500


def test_the_numbers_are_those_of_the_images(done, little):
    """Computed again from the images, by SciPy's matrix root."""
    import scipy.linalg

    real = [Image.open(path) for path in sorted((done.folder.parent / "real").iterdir())]
    ours, theirs = (
        features_of(images, little, "demo").double().numpy()
        for images in (all_images(done.sweep), [image.crop((0, 0, 64, 64)) for image in real])
    )
    # Real images are 64 px wide and up to 66 high: cropped to the middle as `as_samples` says.
    centred = [p.crop((0, round((p.height - 64) / 2), 64, round((p.height - 64) / 2) + 64)) for p in real]
    theirs = features_of(centred, little, "demo").double().numpy()
    covariances = [np.cov(features, rowvar=False) for features in (ours, theirs)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(ours.mean(0) - theirs.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert done.results.rows[1]["fid_demo_features"] == pytest.approx(expected, rel=1e-3)


def test_images_are_those_of_the_sampler_with_the_same_seeds(done, run, little):
    """Stored embeddings, parts and scales change no image."""
    texts = json.loads((done.folder / "prompts.json").read_text())
    assert sorted(texts) == sorted(PROMPTS)
    sampler = Sampler(load_networks(run, "cpu", torch.float32))
    for scale, name in ((1.0, "guidance-1"), (3.0, "guidance-3")):
        expected = sampler.sample(texts, range(6), SampleSettings(scale, 2, "plms", batch_size=2))
        for ours, theirs in zip(all_images(done.sweep, name), expected, strict=True):
            assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1


def test_more_steps_than_the_sampler_can_take_are_refused_before_any_weights_are_read(little, run, tmp_path):
    with pytest.raises(UserError, match=r"cannot be 1500 sampling steps: .* 1 to 999"):
        plan(little.model_copy(update={"num_steps": 1500}), [run], tmp_path / "out")


def test_steps_that_are_spread_now_are_drawn_again_and_all_others_not(little, run, tmp_path):
    def config(num_steps):
        sweep = plan(little.model_copy(update={"num_steps": num_steps}), [run], tmp_path / str(num_steps))
        drawing = next(step for step in sweep.steps() if step.stage.name.startswith("draw-"))
        made = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "sdtrain.evaluation.stages.fingerprint", lambda name, config, weights: made.update(config) or ""
            )
            drawing.stage.fingerprint(drawing.directory, drawing.job, 0)
        return made

    assert "timesteps" not in config(50)
    assert config(400)["timesteps"] == "spread"


def test_notes_show_what_the_first_truncated_prompt_lacks(little, run, tmp_path):
    long = [" ".join([f"w{number}x"] * 60) + f" end{number}" for number in range(6)]
    (tmp_path / "long.txt").write_text("\n".join(long))
    sweep = plan(little.model_copy(update={"prompts": str(tmp_path / "long.txt")}), [run], tmp_path / "out")
    contexts = next(step for step in sweep.steps() if step.stage.name.startswith("contexts-"))
    run_with_bar(contexts.stage, contexts.directory, contexts.job)
    (note,) = sweep._truncated_prompts({})
    assert note.startswith("6 prompts are longer than the text encoder of run")
    assert note.endswith(f" {sweep.prompts.texts[0].rpartition(' ')[2]}”.")


def test_all_scales_begin_with_the_same_noise_and_share_their_embeddings(little, run, tmp_path, monkeypatch):
    seen = {}
    real = Sampler.sample

    def note(self, prompts, seeds, settings=None):
        seen.setdefault(settings.guidance_scale, []).extend(zip(prompts, seeds, strict=True))
        return real(self, prompts, seeds, settings)

    monkeypatch.setattr(Sampler, "sample", note)
    sweep = plan(little, [run], tmp_path / "out")
    run_sweep(sweep, say=quiet)
    assert seen[1.0] == seen[3.0]
    assert [seed for _, seed in seen[1.0]] == list(range(6))
    assert len(list((tmp_path / "out" / "contexts").rglob("*.safetensors"))) == 2  # a file a part, for both scales


def test_again_does_nothing_and_gives_the_same_bytes(done, little, run, monkeypatch):
    before = digests(done.folder)
    monkeypatch.setattr(stages, "_draw", None)  # so that drawing would fail
    run_sweep(plan(little, [run], done.folder), say=quiet)
    assert digests(done.folder) == before


def test_what_was_measured_when_there_was_one_network_counts(done):
    """Names and fingerprints are as they were then."""
    features_by, (model,) = [vae_digest("demo"), ""], done.sweep.models
    drawn, looked = (
        require_entry(done.sweep.directory, f"{stage}-{model.key}-guidance-3", 1) for stage in ("draw", "look")
    )
    assert looked.fingerprint == fingerprint("look/1", [*features_by, "demo"], inputs=[drawn])
    assert list(looked.outputs) == [f"features/{model.key}/guidance-3/00001.safetensors"]
    job = fingerprint("reference/1", [features_by, 64, None, done.sweep.reference.digest, 512])
    assert [directory.root.name for directory, _ in done.sweep.real] == [job[:16]]


def test_a_network_more_measures_its_own_features_alone(done, little, run, monkeypatch):
    """In files of its own, of which a lost one is made again; the numbers of before stay."""
    monkeypatch.setattr(stages, "_draw", None)  # so that drawing would fail
    measured, real = [], stages.features_of
    monkeypatch.setattr(stages, "features_of", lambda *a: measured.append(a[2]) or real(*a))
    changes = {"networks": ("dinov2", "demo"), "dinov2_weights": "random:0"}
    both = type(little).model_validate(little.model_dump() | changes)
    results = run_sweep(plan(both, [run], done.folder, x="fd_dinov2", y="precision_dinov2"), say=quiet)
    assert measured == ["dinov2"] * 4  # 2 parts, 2 scales
    for before, row in zip(done.results.rows, results.rows, strict=True):
        assert before.items() <= row.items()
        assert row["fd_dinov2"] > 0
        assert row["kid_dinov2_std"] > 0
    assert results.protocol["networks_sha256"].keys() == {"demo", "dinov2"}
    whole = digests(done.folder)
    next(done.folder.glob("features/*/guidance-3/dinov2/00001.safetensors")).unlink()
    run_sweep(plan(both, [run], done.folder, x="fd_dinov2", y="precision_dinov2"), say=quiet)
    assert len(measured) == 5
    assert digests(done.folder) == whole


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"x": "clip_score"}, "--x 'clip_score': this evaluation has no such column"),
        ({"y": "fid_demo"}, "Did you mean 'fid_demo_features'"),
    ],
)
def test_an_axis_that_is_not_measured_is_refused_before_anything_is_drawn(little, run, tmp_path, axes, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(little, [run], tmp_path / "out", **axes)


def test_a_lost_part_alone_is_drawn_again_and_every_number_stays(done, little, run, monkeypatch):
    before, drawn = digests(done.folder), []
    real = stages._draw
    monkeypatch.setattr(stages, "_draw", lambda *a: drawn.append((a[1].scale, a[2])) or real(*a))
    next(done.folder.glob("samples/*/guidance-3/00001.tar")).unlink()
    run_sweep(plan(little, [run], done.folder), say=quiet)
    assert drawn == [(3.0, 1)]
    assert digests(done.folder) == before


def test_more_scales_and_more_prompts_keep_what_was_drawn(done, little, run, monkeypatch):
    drawn, real = [], stages._draw
    monkeypatch.setattr(stages, "_draw", lambda *a: drawn.append((a[1].scale, a[2])) or real(*a))
    run_sweep(plan(little.model_copy(update={"scales": (1.0, 2.0, 3.0)}), [run], done.folder), say=quiet)
    assert drawn == [(2.0, 0), (2.0, 1)]


def test_another_seed_draws_other_images(done, little, run):
    before = [image.tobytes() for image in all_images(done.sweep)]
    again = plan(little.model_copy(update={"seed": 100}), [run], done.folder)
    run_sweep(again, say=quiet)
    assert all(a != b.tobytes() for a, b in zip(before, all_images(again), strict=True))


def test_an_export_is_the_same_model_and_another_weight_is_not(little, run, tmp_path):
    folder = export_model(run, tmp_path / "folder")
    ours, exported = identify(run, little), identify(folder, little)
    assert (ours.digest, ours.size_px) == (exported.digest, 64)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1e-3
    pipeline.save_pretrained(tmp_path / "other")
    other = identify(tmp_path / "other", little)
    assert other.digest != ours.digest
    assert other.text_encoder == ours.text_encoder
    assert (ours.label, exported.label) == ("run, step 5", "folder")


def test_two_models_are_two_lines_and_need_a_place(little, run, tmp_path):
    raw = export_model(run, tmp_path / "folder")
    pipeline = StableDiffusionPipeline.from_pretrained(raw)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.5
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--output"):
        plan(little, [run, tmp_path / "other"])
    sweep = plan(little, [run, tmp_path / "other"], tmp_path / "out")
    results = run_sweep(sweep, say=quiet)
    assert [row["model"] for row in results.rows] == ["run, step 5"] * 2 + ["other"] * 2
    assert len(list((tmp_path / "out").glob("contexts/*/00000.safetensors"))) == 1  # both have one text encoder
    with pytest.raises(UserError, match="are the same model"):
        plan(little, [raw, raw], tmp_path / "out")


def test_a_run_keeps_its_own_evaluation(little, run):
    assert plan(little, [run]).directory.root == run / "evaluation"
    assert run_of(next((run / "checkpoints").iterdir())) == run


def test_statistics_give_fid_alone_and_have_to_be_of_the_network(little, run, tmp_path):
    features = np.random.default_rng(0).standard_normal((200, 96))
    np.savez(tmp_path / "s.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    protocol = little.model_copy(update={"reference": str(tmp_path / "s.npz"), "scales": (1.0,)})
    results = run_sweep(plan(protocol, [run], tmp_path / "out"), say=quiet)
    assert set(results.metrics) == {"fid_demo_features", "agreement_demo_checker"}
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="statistics are of 64 features, and network 'demo' gives 96"):
        plan(protocol, [run], tmp_path / "out")


def test_clip_and_cmmd_with_an_open_clip_model(little, run, tmp_path):
    changes = {"agreement": "clip", "clip_model": "ViT-demo", "clip_weights": "random:0", "cmmd": True}
    protocol = type(little).model_validate(little.model_dump() | changes)
    results = run_sweep(plan(protocol, [run], tmp_path / "out"), say=quiet)
    assert {"fid_demo_features", "kid_demo_features", "clip_score", "cmmd"} <= set(results.metrics)
    assert all(-1 <= row["clip_score"] <= 1 and row["cmmd"] > 0 for row in results.rows)
    assert results.protocol["agreement_by"] == "ViT-demo random:0"


def test_latents_that_are_not_finite_are_a_sentence_and_leave_no_part(little, run, tmp_path):
    folder = export_model(run, tmp_path / "folder")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        run_sweep(plan(little, [tmp_path / "nan"], tmp_path / "out"), say=quiet)
    assert not list((tmp_path / "out").glob("samples/**/*.tar"))


def test_images_that_are_all_the_same_are_a_sentence(little, run, tmp_path):
    """A VAE whose numbers are not finite gives black images and no error."""
    folder = export_model(run, tmp_path / "folder")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.fill_(0)
    pipeline.save_pretrained(tmp_path / "black")
    with pytest.raises(UserError, match=r"the same image for 4 prompts|not finite"):
        run_sweep(plan(little, [tmp_path / "black"], tmp_path / "out"), say=quiet)


def test_an_image_that_cannot_be_read_is_named(little, run, tmp_path):
    (tmp_path / "real" / "005.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"005\.png at byte 0 is no image"):
        run_sweep(plan(little, [run], tmp_path / "out"), say=quiet)


def test_prompts_that_change_while_it_runs_are_a_sentence(little, run, tmp_path):
    sweep = plan(little, [run], tmp_path / "out")
    sweep.directory.prompts.write_text(json.dumps(PROMPTS[::-1]))
    with pytest.raises(UserError, match="changed by another evaluation"):
        run_sweep(sweep, say=quiet)


def test_the_references_view_is_kept_and_shared(done, little, run, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrain.evaluation.reference.features_of", None)
    other = plan(little.model_copy(update={"seed": 50}), [run], tmp_path / "other")
    run_sweep(other, say=quiet)
    assert other.real[0][0].root == done.sweep.real[0][0].root


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scales": (1.0, 1.0)}, "each guidance scale once"),
        ({"cmmd": True}, "set agreement to clip"),
        ({"num_promts": 3}, "num_promts"),
        ({"networks": "demo, incepton"}, "there is no 'incepton'. Did you mean 'inception'"),
        ({"networks": ()}, "networks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(little, change, sentence):
    from sdtrain.evaluation.protocol import Protocol
    from sdtrain.settings import parse_settings

    with pytest.raises(UserError, match=sentence):
        parse_settings(Protocol, little.model_dump() | change, "test")


def test_as_is_the_network_sees_real_images_of_any_size(little, run, tmp_path):
    write_images(tmp_path / "large", 8, seed=3, side=90)
    changes = {"reference": str(tmp_path / "large"), "reference_view": "as_is", "scales": (1.0,)}
    whole = run_sweep(plan(little.model_copy(update=changes), [run], tmp_path / "out"), say=quiet)
    changes["reference_view"] = "as_samples"
    cropped = run_sweep(plan(little.model_copy(update=changes), [run], tmp_path / "out"), say=quiet)
    assert cropped.rows[0]["fid_demo_features"] != whole.rows[0]["fid_demo_features"]


def test_a_run_that_still_trains_is_evaluated_at_one_checkpoint(little, run, tmp_path):
    (model,) = plan(little, [run], tmp_path).models
    assert model.path == find_checkpoint(run).path


def test_parts_under_way_still_count_when_another_fails():
    failed, under_way, waiting = Future(), Future(), Future()
    under_way.set_running_or_notify_cancel()
    failed.set_exception(UserError("no memory"))
    Timer(0.3, under_way.set_result, ["a report"]).start()
    Timer(0.3, waiting.set_running_or_notify_cancel).start()
    reports = _completed_reports([failed, under_way, waiting])
    assert next(reports) == "a report"
    with pytest.raises(UserError, match="no memory"):
        next(reports)
    assert waiting.cancelled()


def test_auto_is_decided_once_for_an_evaluation_even_before_it_has_results(little, run, tmp_path, monkeypatch):
    automatic = little.model_copy(update={"dtype": "auto"})
    for speed, expected in ((2.0, "bf16"), (0.01, "bf16")):  # it goes on where bf16 is slow
        monkeypatch.setattr(precision, "cpu_speedup", lambda speed=speed: Speedup(speed, speed))
        assert plan(automatic, [run], tmp_path / "out").protocol.dtype == expected
    assert plan(automatic, [run], tmp_path / "other").protocol.dtype == "fp32"
    (tmp_path / "out" / "protocol.json").unlink()  # as one that was finished before there was such a file
    (tmp_path / "out" / "results.json").write_text(json.dumps({"protocol": {"dtype": "fp16"}}))
    assert plan(automatic, [run], tmp_path / "out").protocol.dtype == "fp16"


def test_the_vaes_precision_stays_that_of_the_evaluation_and_marks_what_was_drawn(tmp_path, run, little, monkeypatch):
    def planned(name):
        return plan(little, [run], tmp_path / name)

    def drawn(sweep):
        step = next(step for step in sweep.steps() if step.stage.name.startswith("draw"))
        return step.stage.fingerprint(step.directory, step.job, 0)

    assert planned("cpu").protocol.vae_dtype == "fp32"
    precisions = [little.model_copy(update={"vae_dtype": name}) for name in ("auto", "fp32", "bf16")]
    found = [drawn(plan(chosen, [run], tmp_path / "prints")) for chosen in precisions]
    assert found[0] == found[1] != found[2]
    monkeypatch.setattr("sdtrain.evaluation.sweep.decoder_dtype", lambda dtype: torch.bfloat16)  # as on a GPU
    assert planned("gpu").protocol.vae_dtype == "bf16"
    assert planned("cpu").protocol.vae_dtype == "fp32"
    recorded = tmp_path / "cpu" / "protocol.json"
    content = json.loads(recorded.read_text())
    del content["vae_dtype"]  # from before there was a choice
    recorded.write_text(json.dumps(content))
    assert planned("cpu").protocol.vae_dtype == "fp32"


def test_the_noted_protocol_holds_no_credential(little, run, tmp_path):
    sweep = plan(little, [run], tmp_path / "out")
    signed = replace(
        sweep, protocol=little.model_copy(update={"network_weights": "https://me:pass@h/w.pth?sig=s3cr3t"})
    )
    described = json.dumps(signed._described())
    assert "s3cr3t" not in described
    assert "pass@" not in described
