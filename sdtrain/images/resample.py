"""Resamples an image to several sizes at once, with Pillow's filters and to the bit with Pillow's results.

Pillow filters along one side and then along the other, by weights in whole multiples of 2^-22, and rounds to 8 bits
after each. Both are products with sparse matrices of integers, which scipy computes in half of Pillow's time and
without the GIL; several views of an image share the first one. tests/sdtrain/images/test_resample.py compares with
Pillow, whose version decides which side comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL.Image import Resampling

Pixels = NDArray[np.uint8]
_Reals = NDArray[np.float64]
_PRECISION = 22  # bits of a weight, Pillow's PRECISION_BITS for 8-bit channels
_HALF = 1 << (_PRECISION - 1)
_VALUES_AT_ONCE = 1 << 18  # a megabyte: more is no faster, and would be gigabytes for a large image
_TALL_IMAGES_BY_HEIGHT = int(PIL.__version__.split(".")[0]) >= 13


class _Side(NamedTuple):
    """Lines `start` to `stop` of the `num` to which those of one side are resampled."""

    filter: Resampling
    num: int
    start: int
    stop: int


@dataclass(frozen=True)
class View:
    """An image at another size, width and height `size_px`, or only the part `box` (left, top, right, bottom) of it."""

    size_px: tuple[int, int]
    filter: Resampling
    box: tuple[int, int, int, int] | None = None

    @property
    def columns(self) -> _Side:
        """The columns of the view's part."""
        left, _, right, _ = self.box or (0, 0, *self.size_px)
        return _Side(self.filter, self.size_px[0], left, right)

    @property
    def rows(self) -> _Side:
        """The rows of the view's part."""
        _, top, _, bottom = self.box or (0, 0, *self.size_px)
        return _Side(self.filter, self.size_px[1], top, bottom)

    def starts_with_height(self, width: int, height: int) -> bool:
        """Whether Pillow shrinks an image's height first: since its version 13, if it shrinks by far more."""
        shrunk_by, narrowed_by = height - self.size_px[1], width - self.size_px[0]
        return _TALL_IMAGES_BY_HEIGHT and shrunk_by > max(0, 2 * narrowed_by)


def resample(pixels: Pixels, views: Sequence[View]) -> list[Pixels]:
    """Returns (h, w, C) uint8 for each view of an image (H, W, C); a `box` must lie within its view.

    The bits are those of Pillow's `resize(size_px, filter).crop(box)`. Filters: BOX, BILINEAR, BICUBIC and LANCZOS.
    """
    height, width = pixels.shape[:2]
    by_height = [view for view in views if view.starts_with_height(width, height)]
    by_width = [view for view in views if view not in by_height]
    found = dict[View, Pixels]()
    if by_width:
        columns = tuple(view.columns for view in by_width)
        parts = np.split(_filter_rows(pixels, columns), _edges(columns), axis=1)
        found |= {view: _filter_columns(part, (view.rows,)) for view, part in zip(by_width, parts, strict=True)}
    if by_height:
        rows = tuple(view.rows for view in by_height)
        parts = np.split(_filter_columns(pixels, rows), _edges(rows))
        found |= {view: _filter_rows(part, (view.columns,)) for view, part in zip(by_height, parts, strict=True)}
    return [found[view] for view in views]


def _edges(sides: tuple[_Side, ...]) -> NDArray[np.int_]:
    return np.cumsum([side.stop - side.start for side in sides])[:-1]


def _filter_rows(pixels: Pixels, columns: tuple[_Side, ...]) -> Pixels:
    """(H, W, C) -> (H, w, C), the columns of all sides beside one another; some rows at a time."""
    weights = _weights(pixels.shape[1], columns)
    filtered = np.empty((len(pixels), weights.shape[0], pixels.shape[2]), np.uint8)
    at_once = max(1, _VALUES_AT_ONCE // pixels[0].size)
    for top in range(0, len(pixels), at_once):
        band = _product(weights, _turned(pixels[top : top + at_once]))
        filtered[top : top + at_once] = _turned(band)
    return filtered


def _filter_columns(pixels: Pixels, rows: tuple[_Side, ...]) -> Pixels:
    """(H, W, C) -> (h, W, C), the rows of all sides below one another; some columns at a time."""
    weights = _weights(len(pixels), rows)
    filtered = np.empty((weights.shape[0], *pixels.shape[1:]), np.uint8)
    at_once = max(1, _VALUES_AT_ONCE // pixels[:, 0].size)
    for left in range(0, pixels.shape[1], at_once):
        filtered[:, left : left + at_once] = _product(weights, pixels[:, left : left + at_once])
    return filtered


def _product(weights: Any, pixels: Pixels) -> Pixels:
    """(n, N) weights, (N, M, C) -> (n, M, C), rounded half up as Pillow does, and clipped to 8 bits."""
    sums: NDArray[np.int32] = weights @ pixels.astype(np.int32).reshape(len(pixels), -1)
    sums += _HALF
    sums >>= _PRECISION
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8).reshape(-1, *pixels.shape[1:])


def _turned(pixels: Pixels) -> Pixels:
    """(N, M, C) -> (M, N, C), in memory too; numpy takes several times as long."""
    return cv2.transpose(pixels).reshape(pixels.shape[1], len(pixels), -1)  # type: ignore[return-value]


@lru_cache(maxsize=512)  # up to 100 kB each; images of a dataset have some hundred widths and heights
def _weights(num: int, sides: tuple[_Side, ...]) -> Any:
    """The sparse matrix that filters `num` lines to those of all sides, int32."""
    from scipy.sparse import csr_array, vstack  # lazy, because it takes a tenth of a second

    return vstack([csr_array(_weights_of(num, side)) for side in sides], format="csr", dtype=np.int32)


def _weights_of(num: int, side: _Side) -> Any:
    """As precompute_coeffs and normalize_coeffs_8bpc in Pillow's Resample.c, to the order of additions."""
    from scipy.sparse import csr_array

    kernel, reach = _KERNELS[side.filter]
    scale = num / side.num
    stretch = max(scale, 1.0)
    centre = (np.arange(side.start, side.stop) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(int), 0)
    last = np.minimum((centre + reach * stretch + 0.5).astype(int), num)
    taps = first[:, None] + np.arange((last - first).max())
    is_inside = taps < last[:, None]
    weights = np.where(is_inside, kernel((taps - centre[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # not sum(), which adds in another order
    whole = np.trunc(weights * (1 << _PRECISION) + np.copysign(0.5, weights)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(last - first)])
    return csr_array((whole[is_inside], taps[is_inside], starts), shape=(side.stop - side.start, num))


def _box(x: _Reals) -> _Reals:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def _bilinear(x: _Reals) -> _Reals:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: _Reals) -> _Reals:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: _Reals) -> _Reals:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: _Reals) -> _Reals:
    x = x * math.pi
    return np.divide(np.sin(x), x, out=np.ones_like(x), where=x != 0)


_KERNELS: dict[Resampling, tuple[Callable[[_Reals], _Reals], float]] = {
    Resampling.BOX: (_box, 0.5),
    Resampling.BILINEAR: (_bilinear, 1.0),
    Resampling.BICUBIC: (_bicubic, 2.0),
    Resampling.LANCZOS: (_lanczos, 3.0),
}
"""By filter, the kernel and how far it reaches, in pixels of the smaller image."""
