from http.client import IncompleteRead

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import Inception3

from sdtrain.errors import UserError
from sdtrain.evaluation.features.inception import find_inception, inception_view, load_inception


@pytest.fixture(scope="module")
def network():
    return load_inception("random:0")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8))


def test_the_graph_has_the_key_names_and_shapes_of_the_published_file(network):
    """The file has 566 tensors, torchvision's names, and 1008 classes."""
    theirs = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    ours = network.state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert len(ours) == 566
    assert ours["fc.weight"].shape == (1008, 2048)


def test_features_are_2048_numbers_an_image(network):
    with torch.no_grad():
        found = network(torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (2, 2048)
    assert (found >= 0).all()  # means of rectified values


def test_torchvisions_own_graph_with_those_pools_gives_the_same_features(network, monkeypatch):
    """Its branches and their order; the pools are swapped from outside, where torchvision calls them."""
    theirs = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    theirs.load_state_dict(network.state_dict())
    theirs.fc = torch.nn.Identity()
    mean_pool, in_last = torch.nn.functional.avg_pool2d, []
    theirs.Mixed_7c.register_forward_pre_hook(lambda *_: in_last.append(True))

    def pool(x, kernel_size, stride, padding):
        if in_last:
            return torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)
        return mean_pool(x, kernel_size, stride, padding, count_include_pad=False)

    views = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = network(views)
        monkeypatch.setattr(torch.nn.functional, "avg_pool2d", pool)
        expected = theirs(views)
    assert in_last == [True]
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert ours.std() > 0


def test_pools_leave_the_padding_out_and_the_last_takes_the_maximum(network):
    """With constant input an average that counts padded zeros would be smaller at the rim."""
    seen = {}
    for name in ("Mixed_5b", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        branch = getattr(network, name).branch_pool
        branch.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        for name, channels in (("Mixed_5b", 192), ("Mixed_6b", 768), ("Mixed_7b", 1280)):
            getattr(network, name)(torch.ones(1, channels, 8, 8))
            assert torch.allclose(seen[name], torch.ones(1, channels, 8, 8))
        ramp = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 2048, 8, 8)
        network.Mixed_7c(ramp)
    assert seen["Mixed_7c"][0, 0, 3, 3] == ramp[0, 0, 4, 4]


def test_weights_of_a_file_are_loaded_with_or_without_counters(network, tmp_path):
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    loaded = load_inception(str(tmp_path / "w.pth"))
    assert torch.equal(loaded.Mixed_7c.branch1x1.conv.weight, network.Mixed_7c.branch1x1.conv.weight)


def test_another_network_is_a_sentence(network, tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no Inception of FID: fc\.weight has shape \(1000, 2048\)"):
        load_inception(str(tmp_path / "w.pth"))
    torch.save({"fc.weight": network.fc.weight.data}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no Inception of FID: it lacks Conv2d_1a_3x3"):
        load_inception(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("error", [OSError("no route to host"), IncompleteRead(b"half", 100)])
def test_without_the_file_and_the_network_a_sentence_says_where_to_put_it(tmp_path, monkeypatch, error):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))

    def no_network(*_, **__):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    expected = r"pt_inception-2015-12-05-6726825d\.pth are not in .*cache and could not be fetched .*put it there"
    with pytest.raises(UserError, match=expected):
        find_inception("inception-fid")


def test_a_file_of_that_name_with_other_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256 differs"):
        find_inception("inception-fid")


def test_pytorch_fid_resizes_inside_the_net_between_pixels_centres(image):
    seen = inception_view(image, "pytorch-fid")
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)[0] * 2 - 1
    assert seen.shape == (3, 299, 299)
    assert torch.allclose(seen, expected)


def test_tensorflows_grid_begins_at_the_first_pixel(image):
    """By its definition: place i of the result is place i * length / 299 of the image."""
    seen = inception_view(image, "torch-fidelity")
    pixels = np.asarray(image, np.float64)
    for row, column in ((0, 0), (10, 200), (298, 298), (150, 3)):
        y, x = row * 20 / 299, column * 32 / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 19), min(left + 1, 31)
        dy, dx = y - top, x - left
        value = (1 - dy) * ((1 - dx) * pixels[top, left] + dx * pixels[top, right])
        value += dy * ((1 - dx) * pixels[bottom, left] + dx * pixels[bottom, right])
        np.testing.assert_allclose(seen[:, row, column].numpy(), (value - 128) / 128, atol=1e-5)


def test_clean_fid_smooths_before_it_shrinks():
    """A fine chessboard becomes even grey; plain bilinear keeps its pattern."""
    board = np.indices((1024, 1024)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8))
    clean, plain = (inception_view(image, resize)[:, 20:-20, 20:-20].std() for resize in ("clean-fid", "pytorch-fid"))
    assert clean < 0.06 < 0.3 < plain


def test_clean_fid_is_pillows_bicubic_channel_by_channel_without_rounding(image):
    seen = inception_view(image, "clean-fid")
    red = Image.fromarray(np.asarray(image)[:, :, 0].astype(np.float32), mode="F").resize((299, 299), Image.BICUBIC)
    np.testing.assert_array_equal(seen[0].numpy(), (np.asarray(red) - 128) / 128)
