import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.stage import pending
from sdtrain.dataset.tars import read_samples
from sdtrain.encode import vae as vae_at_work
from sdtrain.encode.check import DecodeQuality, psnr_bound_db, require_good
from sdtrain.encode.stage import ENCODE, drop_latents
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_vae
from sdtrain.images.crops import bucket_sizes, resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb
from sdtrain.loading.latent_store import LatentStore
from tests.sdtrain.encode.packed_fixtures import NUM_SAMPLES, RESOLUTION, Recipe, encode, write_packed

SHAPES = [(120, 60), (60, 120), (80, 80), (100, 90)]


def shape_of(number: int) -> tuple[int, int]:
    return SHAPES[number % len(SHAPES)]


def test_crops_lie_at_random_places_along_the_longer_side_and_training_sees_each_in_its_turn(tmp_path):
    dataset = write_packed(tmp_path, size_of=lambda number: (200, 70) if number % 2 else (70, 200))
    encode(dataset, Recipe("demo", num_crops=3))
    members = dict(sample for shard in (0, 1) for sample in read_samples(dataset.latents_tar(shard)))
    packed = dict(sample for shard in (0, 1) for sample in read_samples(dataset.packed_tar(shard)))
    store, network, lefts = LatentStore(dataset.root, RESOLUTION), load_vae("demo"), set()
    pieces = {key: np.load(io.BytesIO(content["moments.npy"])) for key, content in members.items()}
    for number, (key, content) in enumerate(members.items()):
        boxes = json.loads(content["json"])["crop_boxes"]
        along = [box[number % 2 == 0] for box in boxes]
        assert along == sorted(along)
        assert {round(box[2] - box[0]) for box in boxes} == {round(box[3] - box[1]) for box in boxes} == {70}
        lefts |= set(along)
        left, top = (round(edge * RESOLUTION / 70) for edge in boxes[1][:2])
        crop = decode_rgb(packed[key]["jpg"]).resize((183, 64) if number % 2 else (64, 183), 3)
        pixels = np.asarray(crop)[None, top : top + RESOLUTION, left : left + RESOLUTION]
        np.testing.assert_allclose(
            vae_at_work.encode_pixels(network, pixels.copy())[0].astype(np.float32),
            pieces[key][1],
            atol=0.02,
            rtol=0.02,
        )
        seen = []
        for epoch in range(6):
            rows = store.buffer(1, 0)
            store.fetch(np.array([number]), np.array([epoch]), 7, rows).require_whole()
            seen.append(next(n for n in range(3) if np.array_equal(pieces[key][n], rows[0])))
        assert seen == [(seen[0] + epoch) % 3 for epoch in range(6)]
    assert len(lefts) > 2 * sum(NUM_SAMPLES)


def test_one_crop_lies_at_a_random_place_if_asked_as_in_the_original_runs(tmp_path):
    dataset = write_packed(tmp_path, size_of=lambda number: (200, 70) if number % 2 else (70, 200))
    encode(dataset, Recipe("demo"))
    centre = dataset.latents_tar(0).read_bytes()
    assert pending(ENCODE, dataset, Recipe("demo", crop="centre")) == []  # the default, and in no fingerprint
    assert pending(ENCODE, dataset, Recipe("demo", crop="random")) == [0, 1]
    encode(dataset, Recipe("demo", crop="random"))
    random = dataset.latents_tar(0).read_bytes()
    assert random != centre
    assert json.loads(dataset.latents_info.read_text())["resize"] == "shorter side, bicubic, random crop"
    places = [json.loads(content["json"])["crop_box"] for _, content in read_samples(dataset.latents_tar(0))]
    along = {box[number % 2 == 0] for number, box in enumerate(places)}
    assert len(along) == len(places)  # each at its own place, and the same ones again
    encode(dataset, Recipe("demo", crop="random"))
    assert dataset.latents_tar(0).read_bytes() == random


def test_each_image_gets_the_bucket_of_its_shape_and_training_numbers_them_size_by_size(tmp_path):
    dataset = write_packed(tmp_path, size_of=shape_of)
    encode(dataset, Recipe("demo", buckets=[(64, 64), (88, 48), (48, 88)]))
    store = LatentStore(dataset.root, RESOLUTION)
    assert store.sizes == [(8, 8), (6, 11), (11, 6)]
    assert store.counts.tolist() == [[2, 2, 1], [2, 0, 1]]  # images 0 to 4, and 5 to 7
    assert [int(uid, 16) for uid in store.uids(np.arange(8))] == [2, 3, 6, 7, 0, 4, 1, 5]
    for indices, size in (([0, 3], (8, 8)), ([4, 5], (6, 11)), ([6, 7], (11, 6))):
        assert store.get(np.array(indices)).shape == (2, 8, *size)
    with pytest.raises(ValueError, match="shape"):
        np.stack([store.get(np.array([0])), store.get(np.array([4]))])


def test_buckets_are_counted_again_after_a_removal(tmp_path):
    dataset = write_packed(tmp_path, size_of=shape_of)
    encode(dataset, Recipe("demo", buckets=[(64, 64), (88, 48), (48, 88)]))
    drop_latents(dataset.latents_table(0), {f"{4:032x}"})
    store = LatentStore(dataset.root, RESOLUTION)
    assert store.counts.tolist() == [[2, 1, 1], [2, 0, 1]]
    assert [int(uid, 16) for uid in store.uids(np.arange(7))] == [2, 3, 6, 7, 0, 1, 5]


def test_the_rule_makes_sizes_of_about_one_area():
    sizes = bucket_sizes(512, 64, 2.0)
    assert (512, 512) in sizes
    for width, height in sizes:
        assert (height, width) in sizes
        assert width % 64 == height % 64 == 0
        assert 0.75 * 512**2 <= width * height <= 512**2
        assert max(width / height, height / width) <= 2
    assert bucket_sizes(64, 8, 2.0) == [(width // 8, height // 8) for width, height in sizes]


def test_wrong_buckets_are_refused():
    for wrong in ({"buckets": [(60, 64)]}, {"buckets": [(64, 64)], "bucket_step_px": 8}, {"bucket_step_px": 1024}):
        with pytest.raises(ValidationError):
            EncodeConfig(**wrong)


def test_options_that_came_later_leave_finished_shards_finished(tmp_path):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo"))
    assert pending(ENCODE, dataset, Recipe("demo", check_samples=3, min_psnr_db=1)) == []
    assert pending(ENCODE, dataset, Recipe("demo", num_crops=2)) == [0, 1]
    assert pending(ENCODE, dataset, Recipe("demo", bucket_step_px=8)) == [0, 1]


def test_the_figures_of_the_check_stand_in_table_and_info(tmp_path, digests):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo", min_psnr_db=8))
    info = json.loads(dataset.latents_info.read_text())["check"]
    stated = json.loads(pq.read_schema(dataset.latents_table(0)).metadata[b"sdtrain.check"])
    assert info == {"shard": "00000"} | stated
    assert (stated["num_samples"], stated["worst_psnr_db"] < stated["psnr_db"]) == (5, True)
    assert 0.5 < stated["scaled_std"] < 1.7
    before = digests(dataset)
    for path in (dataset.root / "manifest" / "encode").iterdir():
        path.unlink()
    encode(dataset, Recipe("demo", min_psnr_db=8))
    assert digests(dataset) == before


def test_unnormalised_pixels_stop_the_stage_and_leave_nothing(tmp_path, monkeypatch):
    def forget_to_normalise(vae, pixels):
        with torch.inference_mode():
            return vae.encode(pixels.float().to(vae.dtype)).latent_dist.parameters

    good = write_packed(tmp_path / "good", size_of=lambda number: (512, 600))
    encode(good, Recipe("demo", min_psnr_db=20))
    monkeypatch.setattr(vae_at_work, "posterior_moments", forget_to_normalise)
    bad = write_packed(tmp_path / "bad", size_of=lambda number: (512, 600))
    with pytest.raises(UserError, match=r"dataset/00000\.tar do not give their images back: 5 were decoded") as caught:
        encode(bad, Recipe("demo", min_psnr_db=20))
    assert float(re.search(r"PSNR is ([\d.]+) dB", str(caught.value))[1]) < 12
    assert not list(bad.latents_tar(0).parent.glob("*"))


def test_latents_that_are_scaled_already_are_refused():
    figures = DecodeQuality(16, 25.0, 20.0, 0.18)
    with pytest.raises(UserError, match=r"standard deviation is 0\.18 instead of 1"):
        require_good(figures, EncodeConfig(vae="demo", min_psnr_db=20), load_vae("demo"), "here")


@pytest.mark.parametrize(("num_samples", "psnr_db", "is_good"), [(16, 19.9, False), (4, 16.5, True), (1, 7.9, False)])
def test_the_mean_of_few_images_may_lie_lower(num_samples, psnr_db, is_good):
    config, network = EncodeConfig(vae="demo", min_psnr_db=20), load_vae("demo")
    try:
        require_good(DecodeQuality(num_samples, psnr_db, psnr_db, 1.0), config, network, "here")
    except UserError:
        assert not is_good
    else:
        assert is_good


def test_the_bound_is_that_of_the_vae_unless_it_is_set():
    small = load_vae("demo")
    assert psnr_bound_db(EncodeConfig(vae="demo"), small) is None
    assert psnr_bound_db(EncodeConfig(min_psnr_db=21), small) == 21
    small.register_to_config(block_out_channels=(128, 256, 512, 512))
    assert psnr_bound_db(EncodeConfig(), small) == 17
    assert psnr_bound_db(EncodeConfig(min_psnr_db=0), small) is None


def test_a_place_along_the_side_reaches_both_ends():
    wide = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    assert resize_and_crop(wide, (50, 50), 0.0).box == (0, 0, 50, 50)
    assert resize_and_crop(wide, (50, 50), 0.9999).box == (50, 0, 100, 50)
    places = [seeded_uniform("crop", number) for number in range(2000)]
    assert abs(np.mean(places) - 0.5) < 0.02
    assert 0 <= min(places) < max(places) < 1


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_halves_give_the_latents_of_fp32_within_their_rounding_and_are_another_cache(precision, tolerance, tmp_path):
    def latents(dataset):
        members = dict(sample for shard in (0, 1) for sample in read_samples(dataset.latents_tar(shard)))
        return np.stack([np.load(io.BytesIO(content["moments.npy"])) for content in members.values()]).astype(float)

    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo"))
    whole = latents(dataset)
    halved = Recipe("demo", precision=precision)
    assert len(pending(ENCODE, dataset, halved)) == 2
    encode(dataset, halved)
    error = np.abs(latents(dataset) - whole).mean() / whole.std()
    assert 0 < error < tolerance
    assert json.loads(dataset.latents_info.read_text())["precision"] == precision
