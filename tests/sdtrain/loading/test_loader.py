import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sdtrain.config import load_config
from sdtrain.encode.info import VAE_KEY
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, vae_scaling_factor
from sdtrain.loading.latent_store import LatentStore
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sources import open_samples
from tests.training_fixtures import write_config, write_latents, write_models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    return load_config(str(write_config(folder / "c.yaml", models, data)))


def makers(config, world_size):
    store = open_samples(config, vae_scaling_factor(config.vae))
    tokenizer, _ = load_text_encoder(config.text_encoder)
    return [BatchMaker(store, tokenizer, config, rank, world_size) for rank in range(world_size)]


def test_moments_and_captions_come_from_the_right_rows(world):
    store = LatentStore(Path(world.data.root), 64)
    assert len(store) == 50
    indices = np.array([49, 0, 21, 20, 19])
    moments = store.get(indices)
    assert (tuple(moments.shape), moments.dtype) == ((5, 8, 8, 8), torch.float16)
    assert store.uids(indices) == [f"{i:032x}" for i in indices]
    for i, sample, caption in zip(indices, moments, store.captions(indices), strict=True):
        assert abs(sample[:4].float().mean() - (i % 3 - 1) * 2.0) < 0.1
        assert caption.split()[1] == ("red", "green", "blue")[i % 3]
    assert (moments[:, 4:] == -6).all()


def test_a_step_holds_the_same_samples_and_noise_on_any_number_of_ranks(world):
    (alone,), two = makers(world, 1), makers(world, 2)
    assert (alone.accumulation, two[0].accumulation) == (2, 1)
    for step in (0, 6, 13):
        one = [alone.make(step, micro_step) for micro_step in range(2)]
        shared = [maker.make(step, 0) for maker in two]
        assert all(batch.context is None for batch in (*one, *shared))  # captions are encoded online
        for name in set(vars(one[0])) - {"context"}:
            torch.testing.assert_close(
                torch.cat([getattr(b, name) for b in one]),
                torch.cat([getattr(b, name) for b in shared]),
                rtol=0,
                atol=0,
            )


def test_about_a_tenth_of_the_captions_becomes_the_empty_string(world):
    (maker,) = makers(world, 1)
    empty = torch.tensor([52] + [53] * 15)
    dropped = [(maker.make(step, k).token_ids == empty).all(dim=1) for step in range(60) for k in range(2)]
    assert 0.05 < torch.cat(dropped).float().mean() < 0.16


def test_prefetched_batches_are_those_made_directly_and_the_thread_ends(world):
    (maker,) = makers(world, 1)
    batches = maker.prefetch(3, 100, pin_memory=False)
    for step in (3, 4):
        for micro_step in range(2):
            torch.testing.assert_close(next(batches).noise, maker.make(step, micro_step).noise, rtol=0, atol=0)
    batches.close()
    assert "latent-loader" not in [thread.name for thread in threading.enumerate()]


def test_errors_of_the_background_thread_reach_training(tmp_path, world):
    models = Path(world.vae)
    data = write_latents(tmp_path / "data", models, num_samples=8)
    config = world.model_copy(update={"data": world.data.model_copy(update={"root": str(data)})})
    (maker,) = makers(config, 1)
    (data / "latents" / "00000.tar").write_bytes(b"cut short")
    with pytest.raises(UserError, match="shorter than its table says"):
        list(maker.prefetch(0, 2, pin_memory=False))


def test_no_latents_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There are no latents in .*: run `make demo` first, or pass --data DIR"):
        LatentStore(tmp_path, 64)


def test_a_shard_left_over_from_another_vae_is_named(tmp_path, world):
    data = write_latents(tmp_path / "data", Path(world.vae), num_samples=50)
    config = world.model_copy(update={"data": world.data.model_copy(update={"root": str(data)})})
    open_samples(config, 0.35)
    path = data / "latents" / "00001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({VAE_KEY: "f00d"}), path)
    with pytest.raises(UserError, match=r"00001\.tar was made with another VAE"):
        open_samples(config, 0.35)


def test_latents_of_another_vae_or_size_are_refused_with_both_values(tmp_path, world):
    data = write_latents(tmp_path / "data", Path(world.vae), num_samples=4)
    config = world.model_copy(update={"data": world.data.model_copy(update={"root": str(data)})})
    info = data / "latents" / "info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"vae_sha256": "f00d", "resolution": 128}))
    with pytest.raises(UserError, match=r"vae_sha256 is 'f00d' there and '[0-9a-f]{64}' here; resolution is 128 .* 64"):
        open_samples(config, 0.35)
    info.write_text(json.dumps(content | {"normalisation": "none"}))
    with pytest.raises(UserError, match=r"normalisation is 'none' there and 'x / 127\.5 - 1' here"):
        open_samples(config, 0.35)
    info.write_text(json.dumps(content | {"scaling_factor": 0.18215}))
    with pytest.raises(UserError, match=r"scaling_factor is 0\.18215 there and 0\.35 here"):
        open_samples(config, 0.35)
    with pytest.raises(UserError, match=r"holds a latent of 1024 bytes, but data\.resolution 128"):
        LatentStore(data, 128).get(np.array([0]))
