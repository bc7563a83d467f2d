"""Runs img2dataset's resizer from several threads, also on decoded images, with a fast import.

It relies on internals: it replaces `cv2` and `SuppressStdoutStderr` in `img2dataset.resizer` and imports that module
without running its packages' `__init__` (albumentations 1.x's layout). tests/sdtrain/images/test_store.py compares with
stored results of the unchanged resizer, so it fails when those internals change.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sdtrain.dataset.config import DownloadConfig
from sdtrain.errors import UserError
from sdtrain.images.decode import ImageError

Pixels = NDArray[np.uint8]
_ERROR_OF_DECODING = "Image decoding error"  # img2dataset's words
_CANNOT_DECODE = "the image cannot be decoded"
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_ALBUMENTATIONS = "albumentations"
_AUGMENTATIONS = f"{_ALBUMENTATIONS}.augmentations"
_PACKAGES = ("img2dataset", _ALBUMENTATIONS, _AUGMENTATIONS, f"{_AUGMENTATIONS}.geometric", f"{_AUGMENTATIONS}.crops")
# The transforms that the resizer uses, and their modules in albumentations 1.x.
_TRANSFORMS = {
    "SmallestMaxSize": f"{_AUGMENTATIONS}.geometric.resize",
    "LongestMaxSize": f"{_AUGMENTATIONS}.geometric.resize",
    "PadIfNeeded": f"{_AUGMENTATIONS}.geometric.transforms",
    "CenterCrop": f"{_AUGMENTATIONS}.crops.transforms",
}


@dataclass
class Resized:
    """The outcome of resizing: the pixels as encoded, (H, W, 3), BGR, and the image's original size in pixels.

    `content` is the encoded image; None if the original bytes may stay, because no pixel changed.
    """

    content: bytes | None
    pixels: Pixels
    original_width: int
    original_height: int


@dataclass
class _Job:
    given: Pixels | None
    may_stay: bool
    must_stay: bool
    decoded: Pixels | None = None
    final: Pixels | None = None
    stays: bool = False


class ResizeEngine:
    """img2dataset's `Resizer` with a recipe's settings; thread-safe."""

    def __init__(self, config: DownloadConfig) -> None:
        self._resizer = _module().Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=config.resize_only_if_bigger,
            encode_quality=config.encode_quality,
            encode_format=config.encode_format,
        )

    def __call__(
        self, content: bytes, pixels: Pixels | None = None, may_stay: bool = False, must_stay: bool = False
    ) -> Resized:
        """Resizes and encodes an image.

        Args:
            content: the encoded image.
            pixels: the decoded image, (H, W, 3), BGR; None lets img2dataset decode `content`.
            may_stay: do not encode if resizing left the pixels unchanged.
            must_stay: do not encode at all.

        Raises:
            ImageError: "not_an_image", or "resize_failed" for shapes that cannot be resized or encoded.
        """
        job = _jobs.current = _Job(pixels, may_stay, must_stay)
        try:
            encoded, _, _, width, height, error = self._resizer(io.BytesIO(content))
        finally:
            _jobs.current = None
        if error == _ERROR_OF_DECODING:
            raise ImageError("not_an_image", _CANNOT_DECODE)
        if error is not None or job.final is None:
            # Without OpenCV's message, which names its version and source file.
            raise ImageError("resize_failed", "the image cannot be resized or encoded")
        return Resized(None if job.stays else encoded, job.final, width, height)


def decode_scaled(content: bytes, denominator: int) -> Pixels:
    """A JPEG, decoded at 1 / `denominator` (2, 4 or 8) of its size, (H, W, 3), BGR, as its EXIF does not turn it.

    libjpeg leaves out the high frequencies of each 8 x 8 block and computes as many pixels as remain. ImageError
    "not_an_image" if it is damaged.
    """
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED[denominator] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ImageError("not_an_image", _CANNOT_DECODE)
    return pixels  # type: ignore[return-value]


class _Jobs(threading.local):
    current: _Job | None = None


_jobs = _Jobs()


class _Cv2:
    """Replaces `cv2` in img2dataset: supplies decoded pixels, records the final ones and skips needless encoding."""

    def __getattr__(self, name: str) -> Any:
        return getattr(cv2, name)

    @staticmethod
    def imdecode(buffer: Pixels, flags: int) -> Any:
        job = _current_job()
        job.decoded = cv2.imdecode(buffer, flags) if job.given is None else job.given  # type: ignore[assignment]
        return job.decoded

    @staticmethod
    def imencode(extension: str, pixels: Pixels, params: list[int]) -> tuple[bool, Pixels]:
        job = _current_job()
        job.final = pixels
        job.stays = job.must_stay or (job.may_stay and pixels is job.decoded)
        if job.stays:
            return True, np.empty(0, np.uint8)
        return cv2.imencode(extension, pixels, params)


def _current_job() -> _Job:
    if _jobs.current is None:
        raise AssertionError("img2dataset's resizer is called by ResizeEngine alone")
    return _jobs.current


@cache
def _module() -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else the import asks a server for news
    try:
        module = _import_light()
    except ImportError:  # another layout of albumentations
        module = importlib.import_module("img2dataset.resizer")
    # It swaps the process's standard streams around each image: slow, and wrong with threads.
    module.SuppressStdoutStderr = nullcontext  # type: ignore[attr-defined]
    module.cv2 = _Cv2()  # type: ignore[attr-defined]
    return module


def _import_light() -> ModuleType:
    """Imports `img2dataset.resizer` without its packages' `__init__`: a fifth of the time, paid by every child."""
    with _hollow_packages() as packages:
        for name, home in _TRANSFORMS.items():
            setattr(packages[_ALBUMENTATIONS], name, getattr(importlib.import_module(home), name))
        return importlib.import_module("img2dataset.resizer")


@contextmanager
def _hollow_packages() -> Iterator[dict[str, ModuleType]]:
    """Registers the packages without running their `__init__`, and removes them after the block."""
    if any(name in sys.modules for name in _PACKAGES):
        raise ImportError("imported in full already")
    hollow = {}
    try:
        for name in _PACKAGES:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise UserError(f"{name} is not installed. Install sdtrain with its dependencies (`make setup`).")
            hollow[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            hollow[name].__dict__["__version__"] = ""  # a module of albumentations asks for it
        yield hollow
    finally:
        for name in hollow:
            sys.modules.pop(name, None)
