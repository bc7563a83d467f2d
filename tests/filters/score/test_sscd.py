"""SSCD's embeddings from files of the published structure are those of the network that wrote them, stored by SCORE."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torchvision import transforms

from filters.recipe import Recipe, ScoreConfig
from filters.score.preprocess import SSCD_PX
from filters.score.sscd import MEAN, SMALL_SIDE_PX, STD, SscdEncoder, load_sscd, resized_px
from filters.score.stage import SCORE, weight_digests
from sdtrain.dataset.files import sha256_of
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from tests.filters.sscd_fixtures import Published, classy_names, write_scripted
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

IMAGES = [scene_image(0, 300, 200), scene_image(1, 288, 288), scene_image(2, 97, 211)]


@pytest.fixture(scope="module")
def network():
    return Published()


@pytest.fixture(scope="module")
def scripted(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    return path, write_scripted(path, network)


def as_published(network, images, size=SMALL_SIDE_PX) -> np.ndarray:
    """The published way: torchvision's transforms, an image at a time."""
    steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    with torch.no_grad():
        return torch.cat([network(transforms.Compose(steps)(image)[None]) for image in images]).numpy()


def test_embeddings_are_those_of_the_torchscript_module_itself(scripted):
    path, module = scripted
    found = SscdEncoder(path, "cpu").embed(IMAGES)
    np.testing.assert_allclose(found, as_published(module, IMAGES), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert len({tuple(row) for row in found.round(5).tolist()}) == len(IMAGES)


@pytest.mark.parametrize("form", ["torchvision.pt", "classy.pt", "safetensors"])
def test_each_published_naming_gives_the_same_embeddings(network, form, tmp_path):
    path = tmp_path / f"sscd_disc_mixup.{form}"
    state = dict(classy_names(network)) if form == "classy.pt" else network.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    found = SscdEncoder(path, "cpu").embed(IMAGES[:1])
    np.testing.assert_allclose(found, as_published(network, IMAGES[:1]), atol=2e-6)


def test_a_trunk_of_grouped_convolutions_is_recognised_by_its_shapes(tmp_path):
    wide, path = Published(groups=4), tmp_path / "sscd_disc_large.classy.pt"
    torch.save(dict(classy_names(wide)), path)
    found = SscdEncoder(path, "cpu").embed(IMAGES[1:2])
    np.testing.assert_allclose(found, as_published(wide, IMAGES[1:2]), atol=2e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (1023, 767), (288, 289), (5, 4000), (4001, 3)])
def test_sizes_are_rounded_as_torchvision_does(size):
    scene = scene_image(0, 8, 8).resize(size)
    if max(size) <= 1023:
        assert transforms.Resize(SMALL_SIDE_PX)(scene).size == resized_px(*size)
    assert min(resized_px(*size)) == SMALL_SIDE_PX


def test_counters_that_only_training_needs_may_be_missing(network, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({name: value for name, value in network.state_dict().items() if "num_batches" not in name}, path)
    assert SscdEncoder(path, "cpu").embed(IMAGES[:1]).shape == (1, 64)


def test_other_weights_and_a_frozen_module_are_refused_in_a_sentence(network, tmp_path):
    state = network.state_dict()
    for name, content in {
        "another.pt": {"weight": torch.zeros(3)},
        "less.pt": {key: value for key, value in state.items() if "layer3" not in key},
        "more.pt": state | {"backbone.extra.weight": torch.zeros(3)},
    }.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} does not hold the weights of SSCD"):
            SscdEncoder(tmp_path / name)
    torch.jit.freeze(torch.jit.script(network)).save(tmp_path / "frozen.pt")
    with pytest.raises(UserError, match="holds no tensors"):
        SscdEncoder(tmp_path / "frozen.pt")
    with pytest.raises(UserError, match="There is no file"):
        SscdEncoder(tmp_path / "none.pt")


NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))
CONTENTS = [encoded(image) for image in (*IMAGES, scene_image(4, 120, 70), scene_image(5, 200, 300))]


def score(folder, **settings) -> tuple[list[dict], pq.ParquetFile]:
    damaged = CONTENTS[0][:600]
    contents = [*CONTENTS[:2], damaged, *CONTENTS[2:]]
    dataset = write_downloads(folder, [Fetched(content) for content in contents], per_shard=len(contents))
    recipe = Recipe(name="test", score=ScoreConfig(**NO_MODELS, **settings))
    run_batch(SCORE, dataset, recipe, [0])
    assert pending(SCORE, dataset, recipe) == []
    file = pq.ParquetFile(dataset.scores(0))
    return file.read().to_pylist(), file


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_score_stores_what_the_module_says_of_the_squeezed_images(scripted, dtype, tmp_path):
    path, module = scripted
    rows, file = score(tmp_path, sscd_weights=str(path), batch_size=2, dtype=dtype)
    assert str(file.schema_arrow.field("sscd_embedding").type) == "fixed_size_list<element: halffloat>[64]"
    assert file.schema_arrow.metadata[b"sdtrain.sscd_digest"] == sha256_of(path).encode()
    assert [row["sscd_embedding"] is None for row in rows] == [False, False, True, False, False, False]
    stored = np.array([row["sscd_embedding"] for row in rows if row["sscd_embedding"]], np.float32)
    expected = as_published(module, [decode_rgb(content) for content in CONTENTS], (SSCD_PX, SSCD_PX))
    np.testing.assert_allclose(stored, expected, atol=5e-4 if dtype == "float32" else 2e-2)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=2e-3)


def test_without_it_tables_and_fingerprints_are_what_they_were(scripted, tmp_path):
    rows, file = score(tmp_path)
    assert not [name for name in file.schema_arrow.names if "sscd" in name]
    assert not [name for name in file.schema_arrow.metadata if b"sscd" in name]
    plain, with_sscd = ScoreConfig(**NO_MODELS), ScoreConfig(**NO_MODELS, sscd_weights=str(scripted[0]))
    assert not [name for name in plain.described() if "sscd" in name], "finished datasets record the digest of these"
    assert [name for name, _ in weight_digests(plain)] == ["clip", "aesthetic", "aesthetic_v1", "safety", "watermark"]
    assert dict(weight_digests(with_sscd))["sscd"] == sha256_of(scripted[0])
    assert len(rows) == len(CONTENTS) + 1


def test_a_pin_of_another_file_is_refused(scripted, tmp_path):
    with pytest.raises(UserError, match=r"score\.sscd_sha256 is 0{64}"):
        score(tmp_path, sscd_weights=str(scripted[0]), sscd_sha256="0" * 64)


def test_random_weights_for_trials_are_narrow_and_the_same_each_time():
    one, other = load_sscd("random:3"), load_sscd("random:3")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(one(pixels), other(pixels))
    assert one.width == 512
    assert sum(tensor.numel() for tensor in one.parameters()) < 5_000_000
