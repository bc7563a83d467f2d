from __future__ import annotations

import hashlib
import io
import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import require_entry, write_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.dataset.tars import read_samples
from sdtrain.demo.train_vae import build_vae
from sdtrain.encode import shard_encoder
from sdtrain.encode import vae as vae_at_work
from sdtrain.encode.stage import ENCODE
from sdtrain.encode.vae import encode_pixels
from sdtrain.errors import UserError
from sdtrain.formats import digests
from sdtrain.formats.frozen import load_vae, vae_digest
from sdtrain.images.crops import resize_and_crop
from sdtrain.images.decode import decode_rgb
from sdtrain.loading.latent_store import LatentStore
from sdtrain.models.weights import DEMO_WEIGHTS
from tests.image_fixtures import scene_image
from tests.sdtrain.encode.packed_fixtures import NUM_SAMPLES, RESOLUTION, Recipe, encode, write_packed


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """The demo's architecture with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vae")
    build_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def dataset(tmp_path, vae) -> DatasetDir:
    """A packed and encoded dataset."""
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe(vae))
    return dataset


def rows_of(dataset: DatasetDir) -> list[dict]:
    return [
        row | {"shard": shard} for shard in (0, 1) for row in pq.read_table(dataset.latents_table(shard)).to_pylist()
    ]


def test_the_offset_in_the_table_is_where_the_numbers_of_the_npy_begin(dataset):
    for shard in (0, 1):
        members = dict(read_samples(dataset.latents_tar(shard)))
        with (
            dataset.latents_tar(shard).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            rows = pq.read_table(dataset.latents_table(shard)).to_pylist()
            assert len(rows) == NUM_SAMPLES[shard]
            for row in rows:
                stored = np.load(io.BytesIO(members[row["key"]]["moments.npy"]))
                raw = mapped[row["offset"] : row["offset"] + row["num_bytes"]]
                assert raw == stored.tobytes()
                assert (stored.dtype, stored.shape) == (np.float16, (8, row["height"], row["width"]))


def test_moments_are_the_unscaled_posterior_of_the_cropped_image(dataset, vae):
    network = load_vae(str(vae))
    packed = [sample for shard in (0, 1) for sample in read_samples(dataset.packed_tar(shard))]
    latents = dict(sample for shard in (0, 1) for sample in read_samples(dataset.latents_tar(shard)))
    for key, members in packed:
        image = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
        scale = RESOLUTION / min(image.size)
        small = image.resize([max(RESOLUTION, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
        left, top = (small.width - RESOLUTION) // 2, (small.height - RESOLUTION) // 2
        cut = np.asarray(small)[top : top + RESOLUTION, left : left + RESOLUTION]
        pixels = torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            posterior = network.encode(pixels).latent_dist
        moments = np.load(io.BytesIO(latents[key]["moments.npy"])).astype(np.float32)
        np.testing.assert_allclose(moments[:4], posterior.mean[0].numpy(), atol=5e-3)
        np.testing.assert_allclose(moments[4:], posterior.logvar[0].numpy(), atol=5e-3, rtol=5e-3)


def test_each_latent_carries_caption_identity_crop_and_source_size(dataset):
    packed = dict(sample for shard in (0, 1) for sample in read_samples(dataset.packed_tar(shard)))
    rows = {row["key"]: row for row in rows_of(dataset)}
    for key, members in (sample for shard in (0, 1) for sample in read_samples(dataset.latents_tar(shard))):
        described, provenance = json.loads(members["json"]), json.loads(packed[key]["json"])
        assert described.items() >= provenance.items()
        assert members["txt"] == packed[key]["txt"]
        assert {name: rows[key][name] for name in ("uid", "caption", "url")} == {
            name: provenance[name] for name in ("uid", "caption", "url")
        }
        width, height = described["source_px"]
        left, top, right, bottom = described["crop_box"]
        assert (width, height) == decode_rgb(packed[key]["jpg"]).size
        assert 0 <= left < right <= width + 1
        assert 0 <= top < bottom <= height + 1
        assert right - left == pytest.approx(min(width, height), abs=0.02)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((128, 128), (0, 0, 128, 128)),
        ((256, 128), (64, 0, 192, 128)),
        ((32, 64), (0, 16, 32, 48)),
        ((64, 65), (0, 0, 64, 64)),
    ],
)
def test_the_crop_is_the_centre_in_pixels_of_the_source(size, box):
    crop = resize_and_crop(Image.new("RGB", size), (RESOLUTION, RESOLUTION), None)
    assert crop.pixels.shape == (RESOLUTION, RESOLUTION, 3)
    assert crop.box == box
    assert crop.source_px == size


@pytest.mark.parametrize("width", [65, 97, 131, 400])
@pytest.mark.parametrize("height", [64, 99, 1000])
def test_every_size_gives_a_full_crop(width, height):
    assert resize_and_crop(Image.new("RGB", (width, height)), (RESOLUTION, RESOLUTION), None).pixels.shape == (
        RESOLUTION,
        RESOLUTION,
        3,
    )


def test_the_info_says_what_training_must_check(dataset, vae):
    info = json.loads(dataset.latents_info.read_text())
    config = json.loads((vae / "config.json").read_text())
    assert info["vae_sha256"] == vae_digest(str(vae))
    assert info["scaling_factor"] == config["scaling_factor"]
    assert (info["resolution"], info["dtype"], info["schema_version"]) == (RESOLUTION, "float16", 1)


def test_training_reads_what_was_encoded(dataset):
    store = LatentStore(dataset.root, RESOLUTION)
    assert len(store) == sum(NUM_SAMPLES)
    moments = np.load(io.BytesIO(list(read_samples(dataset.latents_tar(1)))[2][1]["moments.npy"]))
    assert np.array_equal(store.get(np.array([7])).numpy()[0], moments)
    assert store.captions(np.array([7])) == ["Bild 7"]


def test_encoding_does_nothing_twice_and_any_order_of_shards_gives_the_same_bytes(dataset, vae, digests):
    recipe = Recipe(vae)
    assert pending(ENCODE, dataset, recipe) == []
    before = digests(dataset)
    run_batch(ENCODE, dataset, recipe, [1])
    run_batch(ENCODE, dataset, recipe, [0])
    assert digests(dataset) == before


def test_another_vae_resolution_or_input_makes_latents_pending_again(dataset, vae, tmp_path):
    torch.manual_seed(2)
    build_vae().save_pretrained(tmp_path / "other-vae")
    assert pending(ENCODE, dataset, Recipe(tmp_path / "other-vae")) == [0, 1]
    assert pending(ENCODE, dataset, Recipe(vae, resolution=128)) == [0, 1]
    entry = require_entry(dataset, "pack", 1)
    other = {name: output.model_copy(update={"sha256": "0" * 64}) for name, output in entry.outputs.items()}
    write_entry(dataset, entry.model_copy(update={"outputs": other}))
    assert pending(ENCODE, dataset, Recipe(vae)) == [1]


def test_the_same_vae_in_another_folder_makes_nothing_pending(dataset, vae, tmp_path):
    load_vae(str(vae)).save_pretrained(tmp_path / "copy" / "vae")
    assert pending(ENCODE, dataset, Recipe(tmp_path / "copy")) == []


def test_the_report_counts_what_was_encoded(dataset):
    assert [require_entry(dataset, "encode", shard).num_out for shard in (0, 1)] == list(NUM_SAMPLES)


def test_a_damaged_image_is_named_with_its_shard(tmp_path, vae):
    dataset = write_packed(tmp_path, damaged=True)
    with pytest.raises(UserError, match=r"dataset/00000\.tar: the image of 000000000 cannot be decoded"):
        encode(dataset, Recipe(vae))
    assert not list(dataset.latents_tar(0).parent.glob("*"))


def test_a_vae_whose_latents_are_not_finite_is_refused(vae):
    network = load_vae(str(vae))
    network.quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        encode_pixels(network, np.zeros((1, RESOLUTION, RESOLUTION, 3), np.uint8))


def test_the_demos_vae_gives_images_back_from_their_latents():
    network = load_vae("demo")
    pixels = np.stack(
        [resize_and_crop(scene_image(i, 512, 600), (RESOLUTION, RESOLUTION), None).pixels for i in range(8)]
    )
    means = torch.from_numpy(encode_pixels(network, pixels)[:, :4]).float()
    with torch.inference_mode():
        decoded = network.decode(means).sample.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    errors = np.square(127.5 * (decoded + 1) - pixels).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / errors)).mean() > 25


def test_a_vae_that_is_not_there_is_a_sentence(tmp_path):
    dataset = write_packed(tmp_path)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        encode(dataset, Recipe(tmp_path / "nowhere"))
    assert not list(dataset.root.glob("latents/*"))


def test_threads_that_need_the_vae_load_it_once_and_leave_torch_as_it_was():
    vae_at_work._loaded_vae.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(vae_at_work.shared_vae, ["demo"] * 8))
    assert all(vae is loaded[0] for vae in loaded)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_shards_that_an_earlier_version_encoded_stay_and_new_ones_get_their_digest(tmp_path, monkeypatch):
    """Public VAE files have the names of before 2023, over which their digest was reckoned."""
    state, folder = load_vae("demo").state_dict(), tmp_path / "vae"
    former = {}
    for name, tensor in state.items():
        for today, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{today}.", f".{before}.")
        former[name] = tensor
    folder.mkdir()
    (folder / "config.json").write_text((DEMO_WEIGHTS / "vae" / "config.json").read_text())
    save_file(former, folder / "diffusion_pytorch_model.safetensors")
    earlier = hashlib.sha256()
    for name in sorted(former):
        earlier.update(f"{name} {former[name].dtype} {tuple(former[name].shape)}\n".encode())
        earlier.update(former[name].numpy().tobytes())
    assert vae_digest(str(folder)) != earlier.hexdigest()

    dataset, recipe = write_packed(tmp_path / "data"), Recipe(folder)
    with monkeypatch.context() as before:
        before.setattr("sdtrain.formats.frozen.vae_digests", lambda name: iter([earlier.hexdigest()]))
        before.setattr(digests, "_computed", {})
        before.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
        run_batch(ENCODE, dataset, recipe, [0])
    assert json.loads(dataset.latents_info.read_text())["vae_sha256"] == earlier.hexdigest()
    assert pending(ENCODE, dataset, recipe) == [1]
    assert pending(ENCODE, dataset, Recipe("demo")) == [1]
    run_batch(ENCODE, dataset, recipe, [1])
    assert pending(ENCODE, dataset, recipe) == []
    assert json.loads(dataset.latents_info.read_text())["vae_sha256"] == earlier.hexdigest()
    LatentStore(dataset.root, RESOLUTION).check_shards()


def test_the_vae_has_the_next_chunk_before_the_last_ones_moments_are_read(dataset, vae, monkeypatch):
    """So that a GPU need not wait for copies and files; and the bytes are those of one chunk after the other."""
    log, images = [], []
    start = shard_encoder.start_encoding

    class Pending:
        def __init__(self, number, moments):
            self._number, self._moments = number, moments

        def wait(self):
            log.append(f"read {self._number}")
            return self._moments.wait()

    def start_encoding(vae, pixels):
        log.append(f"start {len(images)}")
        images.append(pixels)
        return Pending(len(images) - 1, start(vae, pixels))

    monkeypatch.setattr(shard_encoder, "start_encoding", start_encoding)
    config, source = EncodeConfig(vae=str(vae), resolution=RESOLUTION, batch_size=2), dataset.packed_tar(0)
    samples = list(read_samples(source))
    assert len(samples) >= 5
    found = dict(shard_encoder.ShardEncoder(config, source, (), with_captions=False).encoded(samples))
    chunks = -(-len(samples) // 2)
    expected = ["start 0"]
    for number in range(1, chunks):
        expected += [f"start {number}", f"read {number - 1}"]
    assert log == [*expected, f"read {chunks - 1}"]
    stored = dict(read_samples(dataset.latents_tar(0)))
    assert {key: dict(members) for key, members in found.items()} == {
        key: dict(members) for key, members in stored.items()
    }
