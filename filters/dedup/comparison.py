"""Compares miniatures of two images: whether one is an altered copy of the other.

Pairs whose colours and large cells are about alike are compared as they lie, for a mark laid over one of them
(`filters.dedup.overlays`), and moved to where they match best (`filters.dedup.moves`). The limits were measured on
planted copies and on images that only look alike (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Values
from filters.dedup.measures import FloatPlanes
from filters.dedup.moves import are_moved, are_still, may_be_moved
from filters.dedup.overlays import are_overlaid
from sdtrain.images.miniature import Planes

# Mean differences beyond which nothing else is compared: 99 of 100 copies cropped anywhere by 5 % have 5.2 and 8.0.
_MAX_CHROMA_MEAN, _MAX_LUMA_MEAN = 7.0, 8.0


@dataclass(frozen=True)
class Limits:
    """What two miniatures must have in common.

    Attributes:
        agreement: the least share of pixels that agree where one image lies on the other.
        overlaid_agreement: the same of the cells' darkest or brightest pixels, under an overlay.
    """

    agreement: float
    overlaid_agreement: float


def are_copies(ones: Planes, others: Planes, mirrored: NDArray[np.bool_], limits: Limits) -> NDArray[np.bool_]:
    """Returns (P,): whether miniatures are of altered copies, after mirroring `ones` where `mirrored`."""
    copies = np.zeros(len(mirrored), bool)
    one, other = _floats(ones), _floats(others)
    one = FloatPlanes(*(np.where(_beside(mirrored, plane), plane[..., ::-1], plane) for plane in one))
    left = np.flatnonzero(_may_be_copies(one, other))
    one, other = one.chosen(left), other.chosen(left)
    copies[left] = overlaid = are_overlaid(one, other, limits.overlaid_agreement)
    copies[left[~overlaid]] = are_moved(one.chosen(~overlaid), other.chosen(~overlaid), limits.agreement)
    return copies


def are_confirmed(ones: Planes, others: Planes, limits: Limits) -> NDArray[np.bool_]:
    """Returns (P,): whether miniatures of images that look alike are not those of different content in one frame.

    Other than in `are_copies`, images without structure of their own may be copies.
    """
    one, other = _floats(ones), _floats(others)
    confirmed = are_still(one.luma, other.luma)
    for test in (
        partial(are_overlaid, agreement=limits.overlaid_agreement),
        partial(may_be_moved, agreement=limits.agreement),
    ):
        left = np.flatnonzero(~confirmed)
        confirmed[left] = test(one.chosen(left), other.chosen(left))
    return confirmed


def _floats(planes: Planes) -> FloatPlanes:
    return FloatPlanes(*(plane.astype(np.float32) for plane in planes))


def _may_be_copies(one: FloatPlanes, other: FloatPlanes) -> NDArray[np.bool_]:
    """Returns (P,): whether colours, and brightness in large cells, are about the same; saves most of the time."""
    chroma = np.abs(one.chroma - other.chroma).max(axis=1).mean(axis=(1, 2))
    pairs = ((one.luma, other.luma), (one.dark, other.dark), (one.bright, other.bright))
    luma = np.min([np.abs(_large_cells(a) - _large_cells(b)).mean(axis=(1, 2)) for a, b in pairs], axis=0)
    may_be: NDArray[np.bool_] = (chroma <= _MAX_CHROMA_MEAN) & (luma <= _MAX_LUMA_MEAN)
    return may_be


def _large_cells(planes: Values) -> Values:
    """Returns (P, 4, 4): means without their median."""
    num, side, _ = planes.shape
    cells: Values = planes.reshape(num, 4, side // 4, 4, side // 4).mean(axis=(2, 4))
    return cells - np.median(cells, axis=(1, 2), keepdims=True)


def _beside(chosen: NDArray[np.bool_], plane: Values) -> NDArray[np.bool_]:
    return chosen.reshape(-1, *[1] * (plane.ndim - 1))
