"""A shown batch is the very one of training: the same samples, crops, captions, drops, timesteps and noise."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdtrain.config import load_config
from sdtrain.dataset.tars import read_samples, write_samples
from sdtrain.diffusion import NoiseSchedule, sample_posterior
from sdtrain.encode.stage import latent_offset
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_scaling_factor
from sdtrain.loading.latent_store import LatentStore
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sources import open_samples
from sdtrain.sampling.batch_view import show_batch
from sdtrain.sampling.sampler import decode_latents
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config, write_latents, write_models, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(a config's file, the folder of its dataset, that of its models)."""
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    return write_config(folder / "c.yaml", models, data, steps=9), data, models


def maker(config, rank=0, world_size=1):
    store = open_samples(config, vae_scaling_factor(config.vae))
    return BatchMaker(store, load_text_encoder(config.text_encoder)[0], config, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_its_tensors_are_those_that_the_ranks_trained_on(world, world_size):
    config = load_config(str(world[0]))
    alone, step = maker(config), 7
    for rank in range(world_size):
        makes = maker(config, rank, world_size)
        for micro_step in range(makes.accumulation):
            trained = makes.make(step, micro_step)
            for row in range(config.micro_batch):
                position = (micro_step * world_size + rank) * config.micro_batch + row
                shown, drawn = alone.drawn(step, position)
                for name in ("moments", "posterior", "noise", "timesteps", "token_ids"):
                    assert torch.equal(getattr(shown, name)[0], getattr(trained, name)[row]), name
                assert drawn.timestep == trained.timesteps[row]


def test_images_are_the_decoded_latent_without_and_with_its_noise(world):
    config = load_config(str(world[0]))
    (shown,) = show_batch(config, 3, [1])
    batch, _ = maker(config).drawn(3, 1)
    latents = sample_posterior(batch.moments, batch.posterior, vae_scaling_factor(config.vae))
    noisy = NoiseSchedule(config.diffusion).add_noise(latents, batch.noise, batch.timesteps)
    image, noisy_image = decode_latents(load_vae(config.vae), torch.cat([latents, noisy]), "the VAE")
    assert shown.image.tobytes() == image.tobytes()
    assert shown.noisy.tobytes() == noisy_image.tobytes()


def test_a_dropped_caption_is_said_to_be_dropped(world):
    config = load_config(str(world[0])).model_copy(update={"caption_dropout": 0.5})
    makes = maker(config)
    pairs = [makes.drawn(step, position) for step in range(4) for position in range(config.global_batch_size)]
    empty = makes._tokens([""])[0]
    assert {drawn.is_dropped for _, drawn in pairs} == {True, False}
    assert all(torch.equal(batch.token_ids[0], empty) == drawn.is_dropped for batch, drawn in pairs)


def test_a_crop_is_the_one_of_the_epoch(world, tmp_path):
    """Boxes are recorded in the member before the latent; here with three crops of each image."""
    _, data, _ = world
    (tmp_path / "latents").mkdir()
    info = json.loads((data / "latents" / "info.json").read_text()) | {"num_crops": 3}
    (tmp_path / "latents" / "info.json").write_text(json.dumps(info))
    tar = tmp_path / "latents" / "00000.tar"
    samples = [(f"{i:09d}", _members(i)) for i in range(4)]
    rows = [_row(i, key) | latent_offset(tar, index) for i, (index, (key, _)) in enumerate(zip(
        write_samples(tar, samples), samples, strict=True))]  # fmt: skip
    _write_table(rows, data, tmp_path)
    store = LatentStore(tmp_path, 64)
    for index, (_, members) in enumerate(read_samples(tar)):
        boxes = json.loads(members["json"])["crop_boxes"]
        seen = [store.crop(index, epoch, seed=5) for epoch in range(3)]
        assert sorted(list(crop.box) for crop in seen) == sorted(boxes)
        assert store.crop(index, 3, seed=5) == seen[0]
        assert {crop.source_px for crop in seen} == {(640, 480 + index)}


def _members(i):
    moments = np.full((3, 8, 8, 8), i, np.float16)
    file = io.BytesIO()
    np.save(file, moments)
    boxes = [[float(i), float(crop), 480.0 + i, 480.0] for crop in range(3)]
    described = {"uid": f"{i:032x}", "crop_boxes": boxes, "source_px": [640, 480 + i]}
    return {"moments.npy": file.getvalue(), "json": json.dumps(described).encode(), "txt": b"a" * (600 * i)}


def _row(i, key):
    sizes = {"height": 8, "width": 8, "num_bytes": 3 * 8 * 8 * 8 * 2}
    return {"uid": f"{i:032x}", "key": key, "caption": f"caption {i}", "url": ""} | sizes


def _write_table(rows, data, folder):
    metadata = pq.read_schema(data / "latents" / "00000.parquet").metadata
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "latents" / "00000.parquet")


@pytest.mark.parametrize(
    ("step", "positions", "said"), [(9, [0], "steps 0 to 8"), (0, [99], "the samples 0 to "), (0, [], "the samples")]
)
def test_a_step_or_position_that_does_not_exist_is_refused(world, step, positions, said):
    with pytest.raises(UserError, match=said):
        list(show_batch(load_config(str(world[0])), step, positions))


def test_a_run_shows_each_step_by_the_config_that_it_had_then(world, tmp_path):
    run, old = RunDir(tmp_path), load_config(str(world[0]))
    run.begin(old, 0)
    new = old.model_copy(update={"log_every": 5, "guard": old.guard.model_copy(update={"stall_timeout_s": 99.0})})
    run.record_changes(new, 6)
    run.begin(new, 6)
    assert run.config_at(5) == old
    assert run.config_at(6) == new


def test_the_command_writes_a_sheet_and_answers_in_json(document, world, tmp_path):
    sheet = tmp_path / "batch.html"
    rows = document("batch", world[0], "--step", 2, "--first", 1, "--num", 3, "--output", sheet)
    assert [row["position"] for row in rows] == [1, 2, 3]
    assert {"uid", "caption", "is_dropped", "timestep", "epoch", "crop"} <= rows[0].keys()
    assert rows[0]["caption"] in sheet.read_text()


def test_a_run_whose_data_are_others_now_is_refused(tmp_path):
    """Its checkpoint names the digest of the latents that it was trained on."""
    run = write_run(tmp_path, 0.0)
    write_latents(tmp_path / "data", tmp_path / "models")
    with pytest.raises(UserError, match="does not hold the latents on which"):
        list(show_batch(RunDir(run).config_at(0), 0, [0], run))
