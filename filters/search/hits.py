"""Search results: origin, status, scores and bytes of the images found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
from PIL import Image

from filters.columns import SCORE_COLUMNS
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.sync import read_part
from sdtrain.images.decode import IMAGE_EXTENSIONS, decode_rgb

KEY = re.compile(r"[0-9]{1,18}")
_IMAGES: tuple[str, ...] = ("url", "caption", "sha256", "original_width", "original_height")
_IMAGES += ("extension", "picture_offset", "picture_bytes")
_SELECTED = ("language", "nsfw")


@dataclass(frozen=True)
class Hit:
    """An image of the dataset.

    Attributes:
        similarity: to the query: a cosine, or the share of its words in the caption.
        reason: why it was dropped; None if kept, "undecided" before `decide`.
        scores: LAION's as `NAME_metadata` and ours as `NAME_image`, where present.
        others: further metadata columns.
        found_in: the caption that has the words asked for, with its source, if it is not the alt text.
    """

    similarity: float
    uid: str
    key: str
    shard: int
    url: str = ""
    caption: str = ""
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    found_in: str = ""
    extension: str = "jpg"
    offset: int | None = None
    num_bytes: int | None = None

    @property
    def status(self) -> str:
        """Why it is, or is not, in the training data."""
        return self.reason or "kept"

    @property
    def place(self) -> str:
        """The image's location in the dataset, as tar:member."""
        return f"images/{self.shard:05d}.tar:{self.key}.{self.extension}"

    def row(self) -> dict[str, Any]:
        """Returns a row for tables and JSON."""
        size = f"{self.width}x{self.height}" if self.width else None
        named = {"similarity": round(self.similarity, 4), "caption": self.caption, "url": self.url, "key": self.key}
        named |= {"status": self.status, "size": size, "uid": self.uid, "sha256": self.sha256, "image": self.place}
        found = {"found_in": self.found_in} if self.found_in else {}
        return named | found | dict(self.scores) | dict(self.others)


def image_bytes(dataset: DatasetDir, hit: Hit) -> bytes:
    """Reads the stored image; raises `OSError` if it is gone."""
    if hit.offset is None or hit.num_bytes is None or hit.extension not in IMAGE_EXTENSIONS:
        raise FileNotFoundError(f"{hit.place} has no image")
    return read_part(dataset, dataset.images_tar(hit.shard), hit.offset, hit.num_bytes)


def image_of(dataset: DatasetDir, hit: Hit) -> Image.Image | None:
    """Decodes the image; None if it is lost or damaged."""
    try:
        return decode_rgb(image_bytes(dataset, hit))
    except OSError:
        return None


def look_up(dataset: DatasetDir, found: Iterable[tuple[float, int, str]]) -> list[Hit]:
    """Looks up (similarity, shard, uid) in order, omitting those that no table has."""
    asked = list(found)
    shards, uids = sorted({shard for _, shard, _ in asked}), sorted({uid for _, _, uid in asked})
    if not asked:
        return []
    tables = {"images": dataset.images_table, "selection": dataset.selection, "scores": dataset.scores}
    with closing(duckdb.connect()) as connection:
        rows = {name: _rows(connection, [path(s) for s in shards], name, uids) for name, path in tables.items()}
        decisions = _rows(connection, [dataset.decisions], "decisions", uids)
    is_decided = dataset.decisions.exists()
    hits = []
    for similarity, shard, uid in asked:
        images = rows["images"].get(uid)
        if images is not None:
            reason = decisions.get(uid, {}).get("reason") if is_decided else "undecided"
            hits.append(
                _hit(similarity, shard, images, rows["selection"].get(uid, {}), rows["scores"].get(uid, {}), reason)
            )
    return hits


def _hit(
    similarity: float, shard: int, images: dict[str, Any], chosen: dict[str, Any], scores: dict[str, Any], reason: Any
) -> Hit:
    known = {f"{name}_metadata": chosen.get(name) for name in SCORE_COLUMNS}
    known |= {f"{name}_image": scores.get(name) for name in SCORE_COLUMNS}
    return Hit(
        similarity=similarity,
        uid=images["uid"],
        key=images["key"],
        shard=shard,
        url=images.get("url") or "",
        caption=images.get("caption") or "",
        reason=reason,
        width=images.get("original_width"),
        height=images.get("original_height"),
        sha256=images.get("sha256"),
        scores={name: round(float(value), 4) for name, value in known.items() if value is not None},
        others={name: str(chosen[name]) for name in _SELECTED if chosen.get(name) is not None},
        extension=images.get("extension") or "jpg",
        offset=images.get("picture_offset"),
        num_bytes=images.get("picture_bytes"),
    )


def _rows(
    connection: duckdb.DuckDBPyConnection, paths: list[Path], table: str, uids: list[str]
) -> dict[str, dict[str, Any]]:
    """Returns rows by uid, with the wanted columns that a table has."""
    wanted = {
        "images": ("uid", "key", *_IMAGES),
        "selection": ("uid", *SCORE_COLUMNS, *_SELECTED),
        "scores": ("uid", *SCORE_COLUMNS),
        "decisions": ("uid", "reason"),
    }[table]
    there = [path for path in paths if path.exists()]
    if not there:
        return {}
    had = set(pq.read_schema(there[0]).names)
    columns = ", ".join(name for name in wanted if name in had)
    query = f"SELECT {columns} FROM read_parquet(?, union_by_name = true) WHERE uid IN (SELECT unnest(?))"  # noqa: S608
    cursor = connection.execute(query, [[str(path) for path in there], uids])
    names = [column[0] for column in cursor.description or ()]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor.fetchall()}
