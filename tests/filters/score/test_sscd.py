"""SSCD's embeddings from files of the published structure are those of the network that wrote them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import transforms

from filters.score.sscd import MEAN, SMALL_SIDE_PX, STD, SscdEncoder, resized_px
from sdtrain.errors import UserError
from tests.filters.sscd_fixtures import Published, classy_names, write_scripted
from tests.image_fixtures import scene_image

IMAGES = [scene_image(0, 300, 200), scene_image(1, 288, 288), scene_image(2, 97, 211)]


@pytest.fixture(scope="module")
def network():
    return Published()


@pytest.fixture(scope="module")
def scripted(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    return path, write_scripted(path, network)


def as_published(network, images) -> np.ndarray:
    """The published way: torchvision's transforms, an image at a time."""
    steps = [transforms.Resize(SMALL_SIDE_PX), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
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
