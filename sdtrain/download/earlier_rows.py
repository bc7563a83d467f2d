"""Uses the outcomes of a shard's earlier version again, so that only new or retried rows are fetched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from sdtrain.download.image_shards import TarMembers, new_members, read_rows
from sdtrain.download.rows import SCHEMA, Row, Selected, moved_row
from sdtrain.download.worker_process import EarlierShard
from sdtrain.images.decode import image_extension

MayKeep = Callable[[Selected, str, Callable[[], bytes]], bool]
"""(row, sha256 of the fetched bytes, reads the stored bytes) -> whether the image may be used for the row."""


class EarlierRows:
    """The rows of an earlier version, with their images; close it when done.

    A row that is new in a changed selection has the outcome of one that names the same URL. `may_keep` is asked about
    images where the selection has changed since.
    """

    def __init__(self, earlier: EarlierShard, may_keep: MayKeep) -> None:
        self._earlier, self._may_keep = earlier, may_keep
        rows = read_rows(earlier.table)
        self._rows: dict[str, Row] = {row["uid"]: row for row in rows}
        self._of_url: dict[str, Row] = {row["url"]: row for row in rows if earlier.selection_changed}
        self._of_url |= {row["url"]: row for row in rows if row["reason"] is None and earlier.selection_changed}
        self._taken: dict[str, Row] = {}

    def kept(self, selected: Selected) -> Row | None:
        """The selected row with its earlier outcome, image or failure; None if it is to be fetched."""
        for row in (self._rows.get(selected.uid), self._of_url.get(selected.url)):
            if row is not None and (kept := self._kept(selected, row)):
                self._taken[selected.key] = row
                return kept
        return None

    def _kept(self, selected: Selected, row: Row) -> Row | None:
        if row["reason"] in self._earlier.retried:
            return None
        if not self._earlier.selection_changed:
            return {name: row.get(name) for name in SCHEMA.names}
        if row["reason"] is None and not self._may_keep(selected, row["sha256"], lambda: self._image(row["key"])[1]):
            return None
        return moved_row(selected, row)

    def members(self, row: Row) -> dict[str, bytes]:
        """The tar members of a kept row: byte for byte the earlier ones, unless the row has changed."""
        before = self._taken[row["key"]]
        if all(row[name] == before.get(name) for name in SCHEMA.names):
            return self._tar(before["key"])
        return new_members(row, *self._image(before["key"]))

    def close(self) -> None:
        """Closes the tar."""
        if "_tar" in vars(self):
            self._tar.close()

    @cached_property
    def _tar(self) -> TarMembers:
        return TarMembers(self._earlier.tar)

    def _image(self, key: str) -> tuple[str, bytes]:
        members = self._tar(key)
        extension = image_extension(members)
        return extension, members[extension]
