import json
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtrain.config import TrainConfig, differences, load_config
from sdtrain.dataset.tars import read_samples
from sdtrain.encode.vae import encode_pixels
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_scaling_factor
from sdtrain.images.crops import resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb
from sdtrain.loading.loader import BatchMaker, MicroBatch
from sdtrain.loading.sources import MixedStore, open_samples, require_samples
from sdtrain.settings import parse_settings
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.encode.packed_fixtures import NUM_SAMPLES, Recipe, encode, write_packed
from tests.training_fixtures import write_config, write_latents, write_models

BUCKETS = [(64, 64), (88, 48), (48, 88)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_text_encoder(str(models))[0]


@pytest.fixture
def config_with(tmp_path, models):
    """A function that gives the toy config with other `data`."""

    def make(data: dict, **changes) -> TrainConfig:
        path = write_config(tmp_path / "c.yaml", models, tmp_path / "data")
        content = load_config(str(path)).model_dump()
        content |= changes | {"data": content["data"] | data}
        return parse_settings(TrainConfig, content, "test")

    return make


def makers(config, tokenizer, world_size):
    store = open_samples(config, vae_scaling_factor(config.vae))
    return [BatchMaker(store, tokenizer, config, rank, world_size) for rank in range(world_size)]


def step_of(made: list[BatchMaker], step: int, micro_steps: int) -> list[MicroBatch]:
    """All micro-batches of a step, in the order of the global batch, on the CPU."""
    return [maker.make(step, k).to(torch.device("cpu")) for k in range(micro_steps) for maker in made]


def assert_same_on_any_number_of_ranks(config, tokenizer, steps=(0, 5, 9)):
    sizes = {1: 2, 2: 1}
    wholes = {}
    for world_size, micro_steps in sizes.items():
        made = makers(config, tokenizer, world_size)
        wholes[world_size] = [step_of(made, step, micro_steps) for step in steps]
    for one, two in zip(wholes[1], wholes[2], strict=True):
        for first, second in zip(one, two, strict=True):
            for name, value in vars(first).items():
                torch.testing.assert_close(value, getattr(second, name), rtol=0, atol=0)


def test_sources_are_drawn_from_by_weight_and_numbered_one_after_the_other(tmp_path, config_with, models, tokenizer):
    first = write_latents(tmp_path / "first", models, num_samples=30)
    second = write_latents(tmp_path / "second", models, num_samples=10)
    sources = [{"root": str(first), "weight": 1}, {"root": str(second), "weight": 3}]
    config = config_with({"sources": sources}, caption_dropout=0.0)
    store = open_samples(config, 0.35)
    assert isinstance(store, MixedStore)
    assert len(store) == 40
    assert store.uids(np.array([29, 30])) == [f"{29:032x}", f"{0:032x}"]
    torch.testing.assert_close(store.get(np.array([3, 33]))[0], store.stores[0].get(np.array([3]))[0], rtol=0, atol=0)
    (maker,) = makers(config, tokenizer, 1)
    drawn = np.concatenate([maker._plan.batch(step).indices for step in range(20)])
    assert (drawn >= 30).sum() == 120
    for end in range(40, 121, 40):  # every ten draws from the second are an epoch of it
        seen = drawn[drawn >= 30][end - 10 : end]
        assert sorted(seen) == list(range(30, 40))
    assert_same_on_any_number_of_ranks(config, tokenizer)


def test_weights_and_sources_make_another_digest_but_not_the_place_of_the_data(tmp_path, config_with, models):
    a, b = (write_latents(tmp_path / name, models, num_samples=n) for name, n in (("a", 8), ("b", 6)))

    def digest(*sources):
        return open_samples(config_with({"sources": sources}), 0.35).digest

    both = [{"root": str(a)}, {"root": str(b)}]
    before = digest(*both)
    assert digest(both[0], both[1] | {"weight": 2.0}) != before
    assert digest(*reversed(both)) != before
    a.rename(tmp_path / "moved")
    assert digest({"root": str(tmp_path / "moved")}, both[1]) == before


def test_sources_of_other_vaes_or_sizes_are_refused(tmp_path, config_with, models):
    good, bad = (write_latents(tmp_path / name, models, num_samples=4) for name in ("good", "bad"))
    config = config_with({"sources": [{"root": str(good)}, {"root": str(bad)}]})
    info, table = bad / "latents" / "info.json", json.loads((good / "latents" / "info.json").read_text())
    for wrong, sentence in (
        ({"vae_sha256": "f00d"}, "vae_sha256 is 'f00d' there"),
        ({"resolution": 128}, "resolution is 128 there and 64 here"),
        ({"buckets": BUCKETS}, "other sizes than those in"),
    ):
        info.write_text(json.dumps(table | wrong))
        with pytest.raises(UserError, match=sentence):
            open_samples(config, 0.35)


@pytest.mark.parametrize("damage", ["not finite", "cut short", "table"])
def test_a_damaged_sample_stops_training_or_is_replaced_counted_and_named(
    tmp_path, config_with, models, tokenizer, damage, caplog
):
    data = write_latents(tmp_path / "data", models, num_samples=40)
    config = config_with({"root": str(data), "on_corrupt": "skip"})
    whole = makers(config, tokenizer, 1)[0].make(2, 0)
    tar, table = data / "latents" / "00001.tar", data / "latents" / "00001.parquet"
    if damage == "table":
        content = bytearray(table.read_bytes())
        content[4:300] = bytes(296)
        table.write_bytes(content)
    else:
        content = bytearray(tar.read_bytes())
        content[4000:20000] = b"\xff" * 16000
        tar.write_bytes(content if damage == "not finite" else content[:4000])
    stop = config_with({"root": str(data)})
    with pytest.raises(UserError, match=r"00001\.(tar|parquet)"):
        list(islice(makers(stop, tokenizer, 1)[0].prefetch(0, 5, False), 10))
    with caplog.at_level(logging.WARNING):
        (maker,) = makers(config, tokenizer, 1)
        made = [batch for step in range(5) for batch in step_of([maker], step, 2)]
    assert maker.num_substituted > 0
    assert len(caplog.messages) == len(set(caplog.messages)) <= maker.num_substituted
    assert all("Another sample takes the place of a damaged one." in message for message in caplog.messages)
    assert all(torch.isfinite(batch.moments).all() for batch in made)
    again = maker.make(2, 0)
    changed = [place for place in range(4) if not torch.equal(again.noise[place], whole.noise[place])]
    kept = [place for place in range(4) if place not in changed]
    torch.testing.assert_close(again.moments[kept], whole.moments[kept], rtol=0, atol=0)
    assert_same_on_any_number_of_ranks(config, tokenizer)


def test_skipping_ends_where_all_is_damaged(tmp_path, config_with, models, tokenizer):
    data = write_latents(tmp_path / "data", models, num_samples=10)
    (data / "latents" / "00000.tar").write_bytes(b"cut short")
    (maker,) = makers(config_with({"root": str(data), "on_corrupt": "skip"}), tokenizer, 1)
    with pytest.raises(UserError, match=r"16 substitutes are damaged as well.*shorter than its table says"):
        maker.make(0, 0)


def test_held_out_samples_are_in_no_batch_in_any_shuffle(tmp_path, config_with, models, tokenizer):
    data = write_latents(tmp_path / "data", models, num_samples=50)
    for shuffle in ("global", "blocks"):
        config = config_with(
            {"root": str(data), "shuffle": shuffle, "window_shards": 2}, validation={"num_samples": 15}
        )
        (maker,) = makers(config, tokenizer, 1)
        assert sorted(maker._plan.at(np.arange(35)).indices) == list(range(35))
    with pytest.raises(UserError, match=r"validation\.num_samples 50 leaves nothing to train on: there are 50"):
        makers(config_with({"root": str(data)}, validation={"num_samples": 50}), tokenizer, 1)


def test_the_order_is_part_of_the_run_and_how_it_is_read_is_not(config_with):
    old = config_with({})
    assert differences(old, config_with({"num_workers": 9, "verify": True, "on_corrupt": "skip"})) == []
    assert [str(change) for change in differences(old, config_with({"shuffle": "blocks"}))] == [
        "data.shuffle: global -> blocks"
    ]


def test_the_vae_in_the_loop_sees_random_crops_of_packed_images(tmp_path, config_with, tokenizer):
    dataset = write_packed(tmp_path / "data", size_of=lambda number: (150, 70), extension="webp")
    config = config_with({"root": str(dataset.root), "online_vae": True}, vae="demo", caption_dropout=0.0)
    require_samples(config.data)
    (maker,) = makers(config, tokenizer, 1)
    packed = [sample for shard in (0, 1) for sample in read_samples(dataset.packed_tar(shard))]
    network = load_vae("demo")
    for step in (0, 3):
        picks, batch = maker._plan.micro_batch(step, 0, 0, 1, 4), maker.make(step, 0)
        assert (batch.moments.dtype, batch.moments.shape) == (torch.uint8, (4, 3, 64, 64))
        there = batch.to(torch.device("cpu"))
        assert type(there) is MicroBatch
        for place, (index, epoch) in enumerate(zip(picks.indices, picks.epochs, strict=True)):
            image = decode_rgb(packed[index][1]["webp"])
            place_of_crop = seeded_uniform("crop", config.seed, f"{index:032x}", int(epoch))
            expected = encode_pixels(network, resize_and_crop(image, (64, 64), place_of_crop).pixels[None].copy())[0]
            np.testing.assert_allclose(there.moments[place].numpy(), expected, atol=0.02, rtol=0.02)
    boxes = {seeded_uniform("crop", config.seed, "a", epoch) for epoch in range(5)}
    assert len(boxes) == 5
    assert len(list(maker.prefetch(0, 3, False))) == 6


@pytest.mark.parametrize("damage", ["image", "cut short"])
def test_a_damaged_image_is_replaced_or_named(tmp_path, config_with, tokenizer, damage):
    dataset = write_packed(tmp_path / "data")
    content = bytearray(dataset.packed_tar(0).read_bytes())
    content[600:900] = bytes(300)  # in the first image
    dataset.packed_tar(0).write_bytes(content if damage == "image" else content[:700])
    data = {"root": str(dataset.root), "online_vae": True}
    (stops,) = makers(config_with(data, vae="demo"), tokenizer, 1)
    with pytest.raises(
        UserError, match=r"00000\.tar: sample \d cannot be read: .* Delete the file and run the build again"
    ):
        list(stops.prefetch(0, 3, False))
    (skips,) = makers(config_with(data | {"on_corrupt": "skip"}, vae="demo"), tokenizer, 1)
    assert len(list(skips.prefetch(0, 3, False))) == 6
    assert skips.num_substituted >= (3 if damage == "image" else 15)


def test_a_dataset_without_images_is_a_sentence(tmp_path, config_with, models):
    data = write_latents(tmp_path / "data", models, num_samples=4)
    config = config_with({"root": str(data), "online_vae": True})
    with pytest.raises(UserError, match=r"There are no packed images in .*as far as `pack` first"):
        require_samples(config.data)
    with pytest.raises(UserError, match="There are no packed images"):
        open_samples(config, 0.35)


def test_every_batch_of_buckets_is_of_one_size_and_every_image_comes_once(tmp_path, config_with, tokenizer):
    shapes = [(120, 60), (60, 120), (80, 80), (100, 90)]
    dataset = write_packed(tmp_path / "data", size_of=lambda number: shapes[number % 4])
    encode(dataset, Recipe("demo", buckets=BUCKETS))
    data = {"root": str(dataset.root), "bucket_group": 4}
    config = config_with(data, vae="demo")
    (maker,) = makers(config, tokenizer, 1)
    shapes = {step: [batch.moments.shape[2:] for batch in step_of([maker], step, 2)] for step in range(8)}
    assert {tuple(shape) for made in shapes.values() for shape in made} == {(8, 8), (6, 11), (11, 6)}
    seen = np.bincount(maker._plan.at(np.arange(8 * sum(NUM_SAMPLES))).indices)
    assert np.abs(seen - 8).max() <= 2
    assert_same_on_any_number_of_ranks(config, tokenizer)


@pytest.mark.parametrize(
    ("group", "sentence"),
    [(0, "have 3 sizes. Set data.bucket_group to"), (6, "bucket_group 6 has to be a multiple of micro_batch_size 4")],
)
def test_batches_that_mix_sizes_are_refused(tmp_path, config_with, tokenizer, group, sentence):
    dataset = write_packed(tmp_path / "data")
    encode(dataset, Recipe("demo", buckets=BUCKETS))
    with pytest.raises(UserError, match=sentence):
        makers(config_with({"root": str(dataset.root), "bucket_group": group}, vae="demo"), tokenizer, 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["images", "buckets", "crops in blocks"])
def test_training_and_validation_run_on_what_the_loader_gives(tmp_path, config_with, ranks, way):
    dataset = write_packed(tmp_path / "data", size_of=lambda number: (120, 60) if number % 3 else (80, 80))
    data = {"root": str(dataset.root)}
    if way == "images":
        data |= {"online_vae": True}
    elif way == "buckets":
        data |= {"bucket_group": 8}
        encode(dataset, Recipe("demo", buckets=BUCKETS[:2]))
    else:
        data |= {"shuffle": "blocks", "window_shards": 1}
        encode(dataset, Recipe("demo", num_crops=2))
    config = config_with(data, vae="demo", steps=3, validation={"num_samples": 2, "every": 2})
    run_dir = RunDir(tmp_path / "run")
    assert train(config, run_dir, ranks, stop_requested=iter([False, True]).__next__) == 1
    assert train(config, run_dir, ranks) == 3
