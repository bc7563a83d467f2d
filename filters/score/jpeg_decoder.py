"""The library that decodes JPEGs on a GPU, and what happens to images that it cannot decode there.

TorchCodec (0.16 and later) where it is installed, else torchvision, which has announced the end of its decoder.
"""

from __future__ import annotations

import base64
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from sdtrain.errors import UserError

REFUSED, NO_MEMORY = "refused by the GPU's decoder", "out of GPU memory"
_TINY = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAIAAgD"
    "ASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKB"
    "kaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZ"
    "mqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQF"
    "BgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5"
    "OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX"
    "2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwAoooqyD//Z"
)
"""8 x 8 pixels of one colour."""
_log = logging.getLogger(__name__)
Decode = Callable[[list[Tensor], torch.device], list[Tensor]]


@lru_cache(maxsize=1)
def find_decoder() -> tuple[str, Decode]:
    """Name of the library, and a function that decodes to (3, H, W) uint8 each, or raises RuntimeError."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError, OSError):  # absent, older than 0.16, or without the libraries that it needs
        return "torchvision", _by_torchvision
    return "torchcodec", lambda contents, device: list(decode_jpeg(contents, mode="RGB", device=device))


def _by_torchvision(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():  # since 0.29 that TorchCodec supersedes it, which was asked for first
        warnings.filterwarnings("ignore", message=".*TorchCodec")
        decoded: list[Tensor] = decode_jpeg(contents, ImageReadMode.RGB, device=device)
    return decoded


def why_no_decoder(device: torch.device) -> str | None:
    """The library's error for a tiny JPEG on `device`, or None: there is a decoder that works."""
    try:
        find_decoder()[1]([_bytes(_TINY)], device)
    except (RuntimeError, AttributeError, ImportError, ValueError) as error:
        return f"{find_decoder()[0]}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def require_decoder(device: torch.device, wanted: str) -> bool:
    """Whether JPEGs are decoded on `device`; `wanted` is cpu, gpu or auto.

    UserError if a GPU must and cannot; for `auto` a warning.
    """
    if wanted == "cpu" or device.type != "cuda":
        return False
    if (why := why_no_decoder(device)) is None:
        return True
    advice = "Install TorchCodec (pip install 'torchcodec>=0.16'), or a torchvision built with nvJPEG"
    if wanted == "gpu":
        raise UserError(f"score.decode: gpu cannot work here: {why}. {advice}; or set it to cpu.")
    _log.warning("JPEGs are decoded on the CPU (score.decode: auto), because the GPU cannot: %s. %s.", why, advice)
    return False


class Fallbacks:
    """Counts images that the CPU decoded although a GPU should have, by reason; warns of each reason once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.num_decoded = 0
        self._lock = Lock()

    def add(self, reason: str, error: Exception) -> None:
        """Counts one image."""
        with self._lock:
            self.counts[reason] += 1
            is_first = self.counts[reason] == 1
        if is_first:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("An image goes to the CPU, %s: %s. Others are counted.", reason, first_line)

    def report(self) -> None:
        """Logs the counts, if there are any."""
        if self.counts:
            listed = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.counts.items()))
            _log.warning("The CPU decoded %s; the GPU %s.", listed, f"{self.num_decoded:,}")


@dataclass(frozen=True)
class JpegDecoder:
    """Decodes batches on `device`; counts in `fallbacks` what it leaves to the CPU."""

    device: torch.device
    fallbacks: Fallbacks

    def decode(self, contents: Sequence[bytes]) -> list[Tensor | None]:
        """Decodes to (3, H, W) uint8 each; None for an image that is damaged, or for which there is no memory.

        Libraries do not say which image of a batch they refuse, so a refused batch is tried again by halves. An error
        after which the GPU cannot be used any more is raised.
        """
        if not contents:
            return []
        try:
            decoded = find_decoder()[1]([_bytes(content) for content in contents], self.device)
        except RuntimeError as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise
            if len(contents) == 1:
                is_memory = isinstance(error, torch.OutOfMemoryError)
                self.fallbacks.add(NO_MEMORY if is_memory else REFUSED, error)
                return [None]
        else:
            self.fallbacks.num_decoded += len(decoded)
            return list(decoded)
        half = len(contents) // 2
        return self.decode(contents[:half]) + self.decode(contents[half:])


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
