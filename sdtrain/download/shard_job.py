"""Collects the outcomes of one shard's rows and writes the shard after the last."""

from __future__ import annotations

import hashlib
import io
import json
import time

import exifread

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.removal_ledger import REMOVED, key_digest, refused_images
from sdtrain.dataset.tars import Member
from sdtrain.download.http.failures import FetchError
from sdtrain.download.image_shards import (
    ImageShard,
    TarMembers,
    TemporaryBlobFile,
    new_members,
    read_rows,
    write_shard,
    write_stats,
)
from sdtrain.download.rows import Row, Selected, check_digests, failed_row, image_row, read_selected
from sdtrain.download.worker_process import Finished, Request, ShardRequest
from sdtrain.images.decode import ImageError
from sdtrain.images.store import ImageMaker

_MAX_EXIF_CHARS = 2**17  # a JPEG's block has 64 kB at most; a TIFF's text may be as long as the file
UNREACHED = frozenset({"connection_failed", "dns_failed", "timeout"})


class ShardJob:
    """One shard, from its first row to its files. Many threads call `make`, one thread the rest."""

    def __init__(self, request: Request, asked: ShardRequest, maker: ImageMaker) -> None:
        self._config: DownloadConfig = request.config
        self._asked, self._maker = asked, maker
        self._refused = refused_images(request.removed)
        self._files = ImageShard.in_folder(request.output, asked.shard)
        self._started = time.time()
        self._rows: dict[str, Row] = {row["key"]: row for row in read_rows(asked.retry.table)} if asked.retry else {}
        self._due = [selected for selected in read_selected(asked.selection) if self._is_due(selected)]
        self._waiting = len(self._due)
        self._blobs = TemporaryBlobFile(request.output / f"{asked.shard:05d}.blobs")
        self._places: dict[str, tuple[str, Member]] = {}

    def due(self) -> list[Selected]:
        """The rows to fetch."""
        return self._due

    def make(self, selected: Selected, body: bytes) -> tuple[Row, tuple[str, Member] | None]:
        """Makes and stores the image of a fetched body; returns its row and location."""
        try:
            sha256 = hashlib.sha256(body).hexdigest()
            if self._config.verify_hashes:
                check_digests(selected, body, sha256)
            if self._refused and key_digest("sha256", sha256) in self._refused:
                raise FetchError(REMOVED, "the image was taken out of this dataset")
            image = self._maker(body)
        except (FetchError, ImageError) as error:
            return failed_row(selected, error), None
        place = (image.extension, self._blobs.add(image.content))
        return image_row(selected, image, sha256, exif_of(body)), place

    def add(self, row: Row, place: tuple[str, Member] | None = None) -> bool:
        """Records the row's outcome; returns whether it was the last."""
        self._rows[row["key"]] = row
        if place is not None:
            self._places[row["key"]] = place
        self._waiting -= 1
        return self._waiting == 0

    def finish(self) -> Finished:
        """Writes the shard's files."""
        rows = [self._rows[key] for key in sorted(self._rows)]
        finished_before = TarMembers(self._asked.retry.tar) if self._asked.retry else None

        def members_of(row: Row) -> dict[str, bytes]:
            if row["key"] not in self._places and finished_before:
                return finished_before(row["key"])
            extension, member = self._places[row["key"]]
            return new_members(row, extension, self._blobs.read(member))

        try:
            digest = write_shard(self._files, rows, members_of, self._asked.fingerprint)
        finally:
            self._blobs.close()
            if finished_before:
                finished_before.close()
        write_stats(self._files.stats, rows, self._started, time.time())
        unreached = sum(self._rows[selected.key]["reason"] in UNREACHED for selected in self._due)
        return Finished(shard=self._asked.shard, tar_sha256=digest, num_fetched=len(self._due), num_unreached=unreached)

    def _is_due(self, selected: Selected) -> bool:
        return self._asked.retry is None or self._rows[selected.key]["reason"] in self._asked.retry.reasons


def exif_of(body: bytes) -> str | None:
    """The EXIF tags as img2dataset's JSON: "{}" if there are none, None if they are unreadable or huge."""
    try:
        tags = exifread.process_file(io.BytesIO(body), details=False)
        text = json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
        return text if len(text) <= _MAX_EXIF_CHARS else None
    except Exception:  # whatever a hostile file does to the parser, the image is good
        return None
