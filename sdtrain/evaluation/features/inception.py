"""The Inception network of FID: its graph, its weights and its preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from sdtrain.errors import UserError
from sdtrain.models.clip import pixels_of
from sdtrain.models.weights import Published, find_weights, random_seed, read_state, seeded
from sdtrain.options import Resize

SIDE_PX = 299
PUBLISHED: Mapping[str, Published] = {
    "inception-fid": Published(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    )
}
_NUM_CLASSES = 1008
_NOT_WEIGHTS = ".num_batches_tracked"


class _PooledA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean_pool(x))]


class _PooledC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_mean_pool(x))]


class _PooledE(InceptionE):
    pool: Callable[[Tensor], Tensor]

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(type(self).pool(x)),
        ]


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _MeanPooledE(_PooledE):
    pool = staticmethod(_mean_pool)


class _MaxPooledE(_PooledE):
    pool = staticmethod(lambda x: F.max_pool2d(x, 3, stride=1, padding=1))


class FidInception(Inception3):
    """TensorFlow's Inception of 2015-12-05 up to its pooled features, with the key names of pytorch-fid's file.

    Only the pooling branches differ from torchvision's: averages exclude padded zeros, and the last block takes the
    maximum (mseitzer/pytorch-fid, src/pytorch_fid/inception.py; toshas/torch-fidelity has the same weights).
    """

    def __init__(self) -> None:
        super().__init__(num_classes=_NUM_CLASSES, aux_logits=False, transform_input=False, init_weights=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _PooledA(192, 32), _PooledA(256, 64), _PooledA(288, 64)
        self.Mixed_6b, self.Mixed_6c = _PooledC(768, 128), _PooledC(768, 160)
        self.Mixed_6d, self.Mixed_6e = _PooledC(768, 160), _PooledC(768, 192)
        self.Mixed_7b, self.Mixed_7c = _MeanPooledE(1280), _MaxPooledE(2048)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299) from -1 to 1 -> (B, 2048), spatial means."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.maxpool2(x)
        blocks = (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c)
        for block in (*blocks, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        return x.mean(dim=(2, 3))


def find_inception(weights: str) -> Path | None:
    """Finds the weights file; None for `random:SEED`. UserError if it is unavailable or not the published one."""
    if random_seed(weights) is not None:
        return None
    return find_weights(weights, PUBLISHED, "name a file of them with --network-weights")


def load_inception(weights: str) -> FidInception:
    """The network in eval mode, with `inception-fid` (the published weights), a file's, or `random:SEED` for trials.

    UserError if there are no such weights, or they are another network's.
    """
    path = find_inception(weights)
    with seeded(random_seed(weights)):
        network = FidInception()
    if path is not None:
        state = read_state(path)
        missing, unknown = network.load_state_dict(_checked(state, network, path), strict=False)
        missing = [name for name in missing if not name.endswith(_NOT_WEIGHTS)]
        if missing or unknown:
            name = (missing or unknown)[0]
            raise UserError(f"{path} is no Inception of FID: it {'lacks' if missing else 'has'} {name}.")
    return network.requires_grad_(False).eval()


def _checked(state: dict[str, Tensor], network: FidInception, path: Path) -> dict[str, Tensor]:
    for name, tensor in network.state_dict().items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(f"{path} is no Inception of FID: {name} has shape {tuple(state[name].shape)}.")
    return state


def inception_view(image: Image.Image, resize: Resize) -> Tensor:
    """Resizes an RGB image for Inception: (3, 299, 299) float32 from -1 to 1.

    `pytorch-fid`: bilinear, without smoothing, corners not aligned. `torch-fidelity`: bilinear as in TensorFlow 1,
    whose grid starts at the first pixel's corner. `clean-fid`: Pillow's bicubic in float32, antialiased (Parmar et al.
    2022, arXiv:2104.11222). The last two subtract 128, the first one 127.5.
    """
    if resize == "clean-fid":
        return (_pillow_bicubic(image) - 128) / 128
    pixels = pixels_of(image).permute(2, 0, 1).float()
    if resize == "torch-fidelity":
        return (_tensorflow_bilinear(pixels) - 128) / 128
    resized = F.interpolate(pixels[None] / 255, (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False)[0]
    return 2 * resized - 1


def _pillow_bicubic(image: Image.Image) -> Tensor:
    channels = [
        np.asarray(
            Image.fromarray(np.asarray(channel, np.float32)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        )
        for channel in image.split()
    ]
    return torch.from_numpy(np.stack(channels))


def _tensorflow_bilinear(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (3, 299, 299); tensorflow/core/kernels/resize_bilinear_op.cc with half_pixel_centers off."""
    for dim in (2, 1):
        length = pixels.shape[dim]
        position = torch.arange(SIDE_PX) * torch.tensor(length / SIDE_PX)
        low = position.long()
        high = (low + 1).clamp_max(length - 1)
        weight = (position - low).view((-1, 1) if dim == 1 else (1, -1))
        lower = pixels.index_select(dim, low)
        pixels = lower + (pixels.index_select(dim, high) - lower) * weight
    return pixels
