"""Builds the rows of the images' table: a selected row and its outcome."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.files import read_parquet
from sdtrain.download.http.failures import FetchError
from sdtrain.images.decode import ImageError

if TYPE_CHECKING:  # only the child imports OpenCV
    from sdtrain.images.store import StoredImage

# img2dataset's columns in its order, then ours.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256", "reason", "size_in_metadata")),
        ("phash", pa.int64()),
    ]
)
Row = dict[str, Any]
_SELECTED = ("key", "uid", "url", "caption", "width", "height", "md5", "sha256", "source_row")
_OF_METADATA = ("uid", "caption", "url", "key")
_DIGESTS = {"md5": re.compile(r"[0-9a-f]{32}"), "sha256": re.compile(r"[0-9a-f]{64}")}


@dataclass(frozen=True)
class Selected:
    """A selected row, with the metadata's `width`, `height` and digests, if any.

    `source_row` is of imported images (`sdtrain.download.source.catalogue`).
    """

    key: str
    uid: str
    url: str
    caption: str
    width: int | None = None
    height: int | None = None
    md5: str | None = None
    sha256: str | None = None
    source_row: int | None = None


def read_selected(path: Path) -> list[Selected]:
    """The rows of a selection file, in order."""
    columns = [name for name in _SELECTED if name in pq.read_schema(path).names]
    return [Selected(**row) for row in read_parquet(path, columns).to_pylist()]


def failed_row(selected: Selected, error: FetchError | ImageError) -> Row:
    """The row of an image that could not be fetched or decoded."""
    status = "failed_to_download" if isinstance(error, FetchError) else "failed_to_resize"
    return _row(selected, status=status, reason=error.reason, error_message=str(error))


def image_row(selected: Selected, image: StoredImage, sha256: str, exif: str | None) -> Row:
    """The row of a stored image; `sha256` is of the fetched bytes, `exif` is JSON."""
    original_size = image.original_width, image.original_height
    return _row(
        selected,
        status="success",
        width=image.width,
        height=image.height,
        original_width=image.original_width,
        original_height=image.original_height,
        exif=exif,
        sha256=sha256,
        size_in_metadata=_size_in_metadata(selected, original_size),
        phash=image.phash,
    )


def moved_row(selected: Selected, row: Row) -> Row:
    """An earlier `row` of the same uid, as that of a row selected again."""
    outcome = {name: row.get(name) for name in SCHEMA.names if name not in _OF_METADATA}
    if row["reason"] is None:
        outcome["size_in_metadata"] = _size_in_metadata(selected, (row["original_width"], row["original_height"]))
    return _row(selected, **outcome)


def digest_mismatch(selected: Selected, body: bytes, sha256: str) -> FetchError | None:
    """The "hash_mismatch" of a body without the metadata's digests, of which malformed ones are ignored."""
    if _digest("sha256", selected.sha256) not in (None, sha256):
        return FetchError("hash_mismatch", "the sha256 is not the metadata's")
    md5 = _digest("md5", selected.md5)
    if md5 and md5 != hashlib.md5(body, usedforsecurity=False).hexdigest():
        return FetchError("hash_mismatch", "the md5 is not the metadata's")
    return None


def has_sha256(selected: Selected) -> bool:
    """Whether the metadata can prove the bytes."""
    return _digest("sha256", selected.sha256) is not None


def is_proven(selected: Selected, sha256: str) -> bool:
    """Whether bytes with this sha256 are certainly those that the metadata means."""
    return _digest("sha256", selected.sha256) == sha256


def is_known_to_match(selected: Selected, sha256: str, stored: Callable[[], bytes]) -> bool:
    """Whether an image, fetched earlier as bytes with this sha256, certainly has the metadata's digests.

    `stored` reads the image as stored. No md5 of the fetched bytes was recorded, so where the metadata has one, they
    must have been stored as they came.
    """
    if _digest("md5", selected.md5) is None:
        return _digest("sha256", selected.sha256) in (None, sha256)
    content = stored()
    return hashlib.sha256(content).hexdigest() == sha256 and digest_mismatch(selected, content, sha256) is None


def _row(selected: Selected, **values: Any) -> Row:
    known = {name: getattr(selected, name) for name in _OF_METADATA}
    return dict.fromkeys(SCHEMA.names) | known | values


def _digest(kind: str, value: str | None) -> str | None:
    cleaned = (value or "").strip().lower()
    return cleaned if _DIGESTS[kind].fullmatch(cleaned) else None


def _size_in_metadata(selected: Selected, original_size: tuple[int, int]) -> str | None:
    """How the metadata's size compares with the image's: "same", "swapped" or "other"; None if it gives none."""
    stated = (selected.width, selected.height)
    if None in stated:
        return None
    if stated == original_size:
        return "same"
    return "swapped" if stated == original_size[::-1] else "other"
