"""SSCD, a network for copy detection: its embeddings of an image and of an altered copy of it are nearly the same.

Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection" (CVPR 2022, arXiv 2202.10261);
facebookresearch/sscd-copy-detection publishes the weights as `sscd_disc_mixup.torchscript.pt`, `.torchvision.pt` and
`.classy.pt`, three namings of one network, under CC BY-NC 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from filters.score.weights import find_weights
from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.formats.tensor_file import TensorFile
from sdtrain.models.clip import normalised
from sdtrain.models.weights import RANDOM_FULL, random_seed, seeded

# README.md of sscd-copy-detection, "Preprocessing": `small_288`; SCORE's view is `skew_320`.
SMALL_SIDE_PX = 288
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GEM_POWER, _GEM_LEAST = 3.0, 1e-6
_NUM_LAYERS, _EMBEDDING_SIZE = 4, 512
_COUNTER = "num_batches_tracked"  # of training; some files leave it out
# Classy Vision's names of a bottleneck's parts -> torchvision's (classy_vision/models/resnext.py).
_BLOCK = re.compile(r"backbone\.blocks\.(\d)\.(?:block\d+-)?(\d+)\.(?:_module\.)?(.+)\.(\w+)")
_PARTS = {
    **{f"convolutional_block.{place}": part for place, part in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"))},
    **{"convolutional_block.6": "conv3", "bn": "bn3", "downsample.0": "downsample.0", "downsample.1": "downsample.1"},
}
_ENDS = {"backbone.initial_block._module.0": "conv1", "backbone.initial_block._module.1": "bn1", "embeddings.1": "fc"}


class GeneralisedMean(nn.Module):
    """Pools features (B, C, H, W) to (B, C): the p-th root of the mean p-th power (Radenovic et al. 2018), p = 3."""

    def forward(self, features: Tensor) -> Tensor:
        """Pools features, none of which counts as less than 1e-6."""
        return features.float().clamp(min=_GEM_LEAST).pow(_GEM_POWER).mean(dim=(2, 3)).pow(1 / _GEM_POWER)


class Sscd(nn.Module):
    """A ResNet or ResNeXt trunk of the sizes that `state`, by torchvision's names, has; 512 numbers for ResNet-50."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        from torchvision.models.resnet import Bottleneck, ResNet

        layers = [
            len({name.split(".")[1] for name in state if name.startswith(f"layer{i + 1}.")}) for i in range(_NUM_LAYERS)
        ]
        width, in_group = state["layer1.0.conv2.weight"].shape[:2]
        groups, num_out = width // in_group, len(state["fc.bias"])
        self.trunk = ResNet(Bottleneck, layers, num_out, groups=groups, width_per_group=in_group)
        self.trunk.avgpool = GeneralisedMean()
        missing, others = self.trunk.load_state_dict(dict(state), strict=False)
        if wrong := [*others, *(name for name in missing if not name.endswith(_COUNTER))]:
            raise ValueError(f"its tensors differ in {wrong[0]}")

    @property
    def width(self) -> int:
        """The number of an embedding's dimensions."""
        return self.trunk.fc.out_features

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns unit embeddings (B, D) of normalised images (B, 3, H, W)."""
        return nn.functional.normalize(self.trunk(pixels).float(), dim=-1)


class SscdEncoder:
    """Embeds images with the published weights of a file, whose sha256 is `digest`.

    UserError if there is no file, or it holds another network's weights.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._network = _read(path).to(self._device)
        self.digest = sha256_of(path)

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D) of RGB images, one at a time, as each has its own shape."""
        found = [self._network(normalised(_pixels(image)[None].to(self._device), MEAN, STD)) for image in images]
        embeddings: NDArray[np.float32] = torch.cat(found).cpu().numpy()
        return embeddings


def load_sscd(name: str) -> Sscd:
    """Loads SSCD from a file or by a known name; raises `UserError` for another network's weights.

    For trials, `random:SEED` is a narrow network and `random-full:SEED` one of the published size, both of 512 numbers.
    """
    seed = random_seed(name)
    if seed is None:
        return _read(find_weights(name))
    from torchvision.models.resnet import Bottleneck, ResNet

    layers, width = ([3, 4, 6, 3], 64) if name.startswith(RANDOM_FULL) else ([1] * _NUM_LAYERS, 8)
    with seeded(seed):
        return Sscd(ResNet(Bottleneck, layers, _EMBEDDING_SIZE, width_per_group=width).state_dict()).eval()


def _read(path: Path) -> Sscd:
    tensors = TensorFile(path)
    try:
        return Sscd(dict(_torchvision_names(tensors))).eval()
    except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not hold the weights of SSCD ({str(error).splitlines()[0]}). Take "
            "sscd_disc_mixup.torchscript.pt or .torchvision.pt of facebookresearch/sscd-copy-detection."
        ) from error


def _pixels(image: Image.Image) -> Tensor:
    """Returns (H, W, 3) uint8: the image with 288 pixels on its shorter side."""
    return torch.from_numpy(np.array(image.resize(resized_px(*image.size), Image.Resampling.BILINEAR)))


def resized_px(width: int, height: int) -> tuple[int, int]:
    """Returns the size with 288 pixels on the shorter side, as torchvision's `Resize` rounds it."""
    short = min(width, height)
    return SMALL_SIDE_PX * width // short, SMALL_SIDE_PX * height // short


def _torchvision_names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the trunk's tensors, whether they have torchvision's names or Classy Vision's."""
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        owner, _, kind = name.rpartition(".")
        if block is not None:
            stage, number, part, kind = block.groups()
            yield f"layer{int(stage) + 1}.{number}.{_PARTS[part]}.{kind}", tensor
        elif owner in _ENDS:
            yield f"{_ENDS[owner]}.{kind}", tensor
        else:
            yield name.removeprefix("backbone."), tensor
