"""Reads the bytes of imported images, in place of the web's fetcher."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

import pyarrow as pa
from pydantic import BaseModel

from sdtrain.download.http.failures import FetchError
from sdtrain.download.source.catalogue import Catalogue, Place, unescape
from sdtrain.download.source.tables import TableImages
from sdtrain.download.source.tars import read_member
from sdtrain.download.source.walk import stays_inside
from sdtrain.errors import UserError


class SourceRequest(BaseModel):
    """What a download process needs to read a source: its place on disk, and the folder of its catalogues."""

    path: Path
    catalogues: Path
    follow_links: bool
    max_bytes: int


class SourceReader:
    """Reads images from a source by the number of their row and their URL; for one thread at a time.

    Rows in ascending order are read from front to back, with one tar or table open. UserError if the source is not
    there at all.
    """

    def __init__(self, request: SourceRequest) -> None:
        if not request.path.exists():
            raise UserError(
                f"{request.path}, from which images are imported, is not there. Mount it, or say where it lies now: "
                "`sdtrain import NEW_PLACE --output DATASET`."
            )
        self._request = request
        self._root = os.path.realpath(request.path if request.path.is_dir() else request.path.parent)
        self._catalogue = Catalogue(request.catalogues)
        self._name = ""
        self._tar: IO[bytes] | None = None
        self._table: TableImages | None = None

    def read(self, source_row: int, url: str) -> bytes:
        """The bytes of an image; FetchError says why there are none."""
        place = self._catalogue.place(source_row, url)
        size = place.member_bytes if place.member_offset is not None else place.source_bytes
        if place.table_row is None and size == 0:
            raise FetchError("empty_body", "the file is empty")
        if place.table_row is None and size is not None and size > self._request.max_bytes:
            raise FetchError("too_large", f"more than {self._request.max_bytes:,} bytes")
        try:
            body = self._read(place)
        except (OSError, pa.ArrowException) as error:
            self.close()
            raise FetchError("source_unreadable", type(error).__name__) from error
        if len(body) > self._request.max_bytes:
            raise FetchError("too_large", f"more than {self._request.max_bytes:,} bytes")
        if not body:
            raise FetchError("empty_body", "there are no bytes")
        return body

    def close(self) -> None:
        """Closes what is open."""
        for part in (self._tar, self._table):
            if part is not None:
                part.close()
        self._name, self._tar, self._table = "", None, None

    def _read(self, place: Place) -> bytes:
        if place.member_offset is None and place.table_row is None:
            with self._open(place) as file:
                return file.read(self._request.max_bytes + 1)
        if place.source_file != self._name:
            self.close()
            file = self._open(place)
            if place.table_row is None:
                self._tar = file
            else:
                file.close()
                self._table = TableImages(self._path(place), str(place.table_column))
            self._name = place.source_file
        if self._tar is not None and place.member_offset is not None and place.member_bytes is not None:
            return read_member(self._tar, place.member_offset, place.member_bytes)
        if self._table is not None and place.table_row is not None:
            return self._table(place.table_row)
        raise FetchError("source_changed", "the file is of another kind")

    def _path(self, place: Place) -> Path:
        return Path(self._root, unescape(place.source_file))

    def _open(self, place: Place) -> IO[bytes]:
        """Opens a source's file; FetchError if it is gone, is no file, leads elsewhere, or has another size."""
        path = self._path(place)
        outside = not Path(os.path.normpath(path)).is_relative_to(self._root)
        if outside or not (self._request.follow_links or stays_inside(str(path), self._root)):
            raise FetchError("source_unreadable", "it lies outside the source")
        try:
            # Without waiting for the writer of a pipe.
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        except FileNotFoundError:
            raise FetchError("source_missing", "the file is gone") from None
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise FetchError("source_changed", "no longer a file")
        if place.source_bytes is not None and status.st_size != place.source_bytes:
            file.close()
            raise FetchError("source_changed", "the file has another size now")
        return file
