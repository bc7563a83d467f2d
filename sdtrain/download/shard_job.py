"""Collects the outcomes of one shard's rows and writes the shard after the last."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence

import exifread
from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.files import sha256_of
from sdtrain.dataset.removal_ledger import REMOVED, key_digest, refused_images
from sdtrain.dataset.tars import Member
from sdtrain.download.earlier_rows import EarlierRows
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.urls import request_url
from sdtrain.download.image_shards import ImageShard, TemporaryBlobFile, new_members, write_shard
from sdtrain.download.rows import (
    Row,
    Selected,
    digest_mismatch,
    failed_row,
    has_sha256,
    image_row,
    is_known_to_match,
    is_proven,
    read_selected,
)
from sdtrain.download.shard_stats import Origin, write_stats
from sdtrain.download.worker_process import Finished, Request, ShardRequest
from sdtrain.images.decode import ImageError
from sdtrain.images.store import ImageMaker

_MAX_EXIF_CHARS = 2**17  # a JPEG's block has 64 kB at most; a TIFF's text may be as long as the file
UNREACHED = frozenset({"connection_failed", "dns_failed", "proxy_failed", "timeout", "source_missing"})
Outcome = tuple[Row, tuple[str, Member] | None]
"""A row, and its image's extension and location in the temporary file; None without an image."""


class ShardJob:
    """One shard, from its first row to its files. Many threads call `make`, one thread the rest."""

    def __init__(self, request: Request, asked: ShardRequest, maker: ImageMaker) -> None:
        self._config: DownloadConfig = request.config
        self._asked, self._maker = asked, maker
        self._refused = refused_images(request.removed)
        self._files = ImageShard.in_folder(request.output, asked.shard)
        self._started = time.time()
        self._earlier = EarlierRows(asked.earlier, self._may_keep) if asked.earlier else None
        self._rows: dict[str, Row] = {}
        self._due: list[Selected] = []
        for selected in read_selected(asked.selection):
            if kept := self._earlier.kept(selected) if self._earlier else None:
                self._rows[selected.key] = kept
            else:
                self._due.append(selected)
        self._waiting = len(self._due)
        self._blobs = TemporaryBlobFile(request.output / f"{asked.shard:05d}.blobs")
        self._places: dict[str, tuple[str, Member]] = {}

    def due(self) -> list[list[Selected]]:
        """The rows to fetch, together where they name the same URL."""
        return _by_url(self._due, self._config.allow_private_hosts)

    def make(self, rows: Sequence[Selected], body: bytes) -> list[Outcome]:
        """Makes and stores the image of a fetched body once, for all rows whose digests it has."""
        sha256 = hashlib.sha256(body).hexdigest()
        outcomes, matching = list[Outcome](), list[Selected]()
        for selected in rows:
            error = digest_mismatch(selected, body, sha256) if self._config.verify_hashes else None
            if error:
                outcomes.append((failed_row(selected, error), None))
            else:
                matching.append(selected)
        return outcomes + self._make(matching, body, sha256) if matching else outcomes

    def may_prove(self, rows: Sequence[Selected], failure: FetchError) -> bool:
        """Whether to fetch from a server without a valid certificate what the metadata's sha256 can prove."""
        is_allowed = self._config.unverified_tls == "with_sha256" and failure.reason == "tls_failed"
        return is_allowed and any(map(has_sha256, rows))

    def make_proven(self, rows: Sequence[Selected], body: bytes, failure: FetchError) -> list[Outcome]:
        """`make` for the rows whose sha256 the body has; the others keep the failure."""
        sha256 = hashlib.sha256(body).hexdigest()
        proven = [selected for selected in rows if is_proven(selected, sha256)]
        others = [(failed_row(selected, failure), None) for selected in rows if not is_proven(selected, sha256)]
        return [*others, *self.make(proven, body)]

    def add(self, outcomes: Sequence[Outcome]) -> bool:
        """Records the outcomes of a URL's rows; returns whether they were the last."""
        for row, place in outcomes:
            self._rows[row["key"]] = row
            if place is not None:
                self._places[row["key"]] = place
        self._waiting -= len(outcomes)
        return self._waiting == 0

    def finish(self) -> Finished:
        """Writes the shard's files."""
        rows = [self._rows[key] for key in sorted(self._rows)]
        try:
            digest = write_shard(self._files, rows, self._members, self._asked.fingerprint)
        finally:
            self._blobs.close()
            if self._earlier:
                self._earlier.close()
        write_stats(self._files.stats, rows, Origin(self._started, time.time(), sha256_of(self._asked.selection)))
        unreached = sum(self._rows[selected.key]["reason"] in UNREACHED for selected in self._due)
        return Finished(shard=self._asked.shard, tar_sha256=digest, num_fetched=len(self._due), num_unreached=unreached)

    def _make(self, rows: Sequence[Selected], body: bytes, sha256: str) -> list[Outcome]:
        try:
            if self._is_removed(sha256):
                raise FetchError(REMOVED, "the image was taken out of this dataset")
            image = self._maker(body)
        except (FetchError, ImageError) as error:
            return [(failed_row(selected, error), None) for selected in rows]
        exif, place = exif_of(body), (image.extension, self._blobs.add(image.content))
        return [(image_row(selected, image, sha256, exif), place) for selected in rows]

    def _members(self, row: Row) -> dict[str, bytes]:
        if row["key"] not in self._places and self._earlier:
            return self._earlier.members(row)
        extension, member = self._places[row["key"]]
        return new_members(row, extension, self._blobs.read(member))

    def _may_keep(self, selected: Selected, sha256: str, stored: Callable[[], bytes]) -> bool:
        if self._is_removed(sha256):
            return False
        return not self._config.verify_hashes or is_known_to_match(selected, sha256, stored)

    def _is_removed(self, sha256: str) -> bool:
        return bool(self._refused) and key_digest("sha256", sha256) in self._refused


def _by_url(rows: Sequence[Selected], allow_private: bool) -> list[list[Selected]]:
    """Groups rows by the URL to request, in the order of their first rows."""
    groups: dict[URL | str, list[Selected]] = {}
    for selected in rows:
        try:
            url: URL | str = request_url(selected.url, allow_private)
        except FetchError:
            url = selected.url  # fails by its text alone, as the fetch will say
        groups.setdefault(url, []).append(selected)
    return list(groups.values())


def exif_of(body: bytes) -> str | None:
    """The EXIF tags as img2dataset's JSON: "{}" if there are none, None if they are unreadable or huge."""
    try:
        tags = exifread.process_file(io.BytesIO(body), details=False)
        text = json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
        return text if len(text) <= _MAX_EXIF_CHARS else None
    except Exception:  # whatever a hostile file does to the parser, the image is good
        return None
