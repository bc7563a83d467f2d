"""Lists the images of a foreign WebDataset tar, and reads one of them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sdtrain.download.http.failures import FetchError
from sdtrain.download.source.captions import TEXT_SUFFIXES, Captions
from sdtrain.download.source.walk import Skipped, is_hidden

IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif pjpeg png apng webp gif bmp dib tif tiff avif heic heif jxl jp2 ppm pgm".split()  # noqa: SIM905
)
"""Of files that claim to be images; the reader decides, and drops those that it does not read with a reason."""
_MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class TarImage:
    """One image of a tar: its member's name, where its bytes are, and its caption, if any."""

    name: str
    offset: int
    size: int
    caption: str | None


@dataclass
class _Sample:
    """The members of one key: images by extension, and the bodies of what may be captions."""

    key: str
    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


class TarImages:
    """Iterates over a tar's images, one sample in memory at a time.

    A sample is a run of members with one key, which ends at the first dot of the file's name, as in WebDataset; the
    rest, in any case, is the extension. Each image in it has the caption of the same name up to the last dot, or else
    the sample's. A tar that is damaged or cut short gives its images up to there.
    """

    def __init__(self, path: Path, name: str, captions: Captions, skipped: Skipped) -> None:
        self._path, self._name, self._captions, self._skipped = path, name, captions, skipped

    def __iter__(self) -> Iterator[TarImage]:
        sample = _Sample("")
        try:
            with tarfile.open(self._path, "r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else every header is remembered
                    key, extension = _split(info.name)
                    if key != sample.key:
                        yield from self._images(sample)
                        sample = _Sample(key)
                    if self._is_wanted(info):
                        self._add(sample, extension, tar, info)
                self._check_end(tar)
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            self._skipped.add("tars damaged or cut short, read up to there", f"{self._name}: {error}")
        yield from self._images(sample)

    def _is_wanted(self, info: tarfile.TarInfo) -> bool:
        if info.isdir():
            return False
        name = f"{self._name}#{info.name}"
        if any(map(is_hidden, info.name.split("/"))):
            self._skipped.add("hidden files and folders skipped", name)
        elif not info.isreg() or info.issparse():
            self._skipped.add("neither files nor folders, skipped", name)
        else:
            return True
        return False

    def _add(self, sample: _Sample, extension: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        suffix = extension.rpartition(".")[2]
        if suffix in IMAGE_SUFFIXES:
            if extension in sample.images:
                self._skipped.add(
                    "images skipped, as their sample has another of that name", f"{self._name}#{info.name}"
                )
                return
            sample.images[extension] = info
        elif suffix in (*TEXT_SUFFIXES, "json") and info.size <= _MAX_CAPTION_BYTES:
            body = tar.extractfile(info)
            sample.texts[extension] = body.read() if body else b""

    def _images(self, sample: _Sample) -> Iterator[TarImage]:
        for extension, info in sample.images.items():
            yield TarImage(info.name, info.offset_data, info.size, self._caption(sample, extension))

    def _caption(self, sample: _Sample, extension: str) -> str | None:
        prefix = extension[: extension.rfind(".") + 1]
        for begin in dict.fromkeys((prefix, "")):
            for suffix in (*TEXT_SUFFIXES, "json"):
                body = sample.texts.get(begin + suffix)
                if body is not None:
                    caption = self._captions.parse(body, suffix, f"{self._name}#{sample.key}.{begin}{suffix}")
                    if caption is not None:
                        return caption
        return None

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """Raises for what tarfile takes for the end: a damaged header, or the end of the file."""
        file: IO[bytes] = tar.fileobj  # type: ignore[assignment]
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0") or (not block and tar.offset > self._path.stat().st_size):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset}")


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_member(file: IO[bytes], offset: int, size: int) -> bytes:
    """The bytes of a member; FetchError "source_changed" if no header of that size precedes them."""
    file.seek(max(0, offset - tarfile.BLOCKSIZE))
    try:
        header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise FetchError("source_changed", "the tar is another one now") from None
    body = file.read(size)
    if not header.isreg() or header.size != size:
        raise FetchError("source_changed", "the tar is another one now")
    if len(body) < size:
        raise FetchError("truncated", "the tar ends within it")
    return body
