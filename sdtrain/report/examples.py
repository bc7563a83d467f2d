"""Example images: kept, dropped by each rule, near its threshold, and duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
from PIL import Image

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.removal_ledger import RemovedRows, read_ledger
from sdtrain.dataset.sync import read_part
from sdtrain.images.decode import decode_rgb
from sdtrain.redaction import without_secrets

EXAMPLES_PER_GALLERY = 12
EXAMPLES_PER_SIDE = 6
GROUPS, IMAGES_PER_GROUP = 8, 8
MAX_CHARS = 160
THUMBNAIL_PX = 160
# The first of billions of rows are enough to find examples.
ROWS_TO_CHOOSE_FROM = 100_000

FindImage = Callable[[str], Path | None]
_JOINED = "decisions d JOIN selection s USING (uid) JOIN images i USING (uid) LEFT JOIN scores c USING (uid)"
# Where only a part is shown, this is there already: rows of other shards are no unselected ones.
_UNSELECTED = f"""
CREATE TEMP VIEW IF NOT EXISTS unselected AS
SELECT m.* FROM (FROM metadata LIMIT {ROWS_TO_CHOOSE_FROM}) m ANTI JOIN selection s ON m.url = s.url
"""  # noqa: S608 - a number
_PLACE = "d.key, d.shard, i.picture_offset, i.picture_bytes"


@dataclass(frozen=True)
class Shown:
    """One image on the page."""

    thumbnail: Path
    text: str
    kept: bool


@dataclass(frozen=True)
class Gallery:
    """Related examples: thumbnails, or lines of text for rows without images."""

    title: str
    status: Literal["kept", "dropped", "threshold", "duplicates"]
    rows: list[list[Shown]] = field(default_factory=list)
    """Images; several rows if neighbours are to be compared."""
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """Of the whole dataset: samples dropped, by reason in alphabetical order, and groups of duplicates."""

    dropped: Mapping[str, int]
    num_groups: int


@dataclass(frozen=True)
class RuleThreshold:
    """The recipe's limit of a rule of stage "select" or "decide".

    Its `expression` is SQL for `column` from the views selection s, images i and scores c.
    """

    rule: str
    stage: str
    column: str
    expression: str
    limit: float


def galleries(
    connection: duckdb.DuckDBPyConnection,
    dataset: DatasetDir,
    images: Path,
    counts: Counts,
    find_image: FindImage | None,
    thresholds: Iterable[RuleThreshold] = (),
) -> list[Gallery]:
    """Makes galleries of kept samples, of each rule's limit, of each drop reason, and of duplicates.

    `connection` has the dataset's views open, or views of a part of it beside the `counts` of the whole; `images` gets
    the thumbnails. `find_image` gives a local file for a URL that was never fetched; None shows such rows as text.
    """
    thumbnails = Thumbnails(dataset, images)
    found = [_kept(connection, thumbnails)]
    found += [_near_threshold(connection, thumbnails, threshold) for threshold in thresholds]
    found.append(_never_fetched(connection, RemovedRows(read_ledger(dataset.removed)), images, find_image))
    found += [_dropped(connection, thumbnails, reason, count) for reason, count in counts.dropped.items()]
    found.append(_duplicates(connection, thumbnails, counts.num_groups))
    return [gallery for gallery in found if any(gallery.rows) or gallery.lines]


def count_examples(connection: duckdb.DuckDBPyConnection) -> Counts:
    """Counts what the galleries show examples of, in tables of one file each."""
    dropped = connection.execute(
        "SELECT reason, count(*) FROM decisions WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
    ).fetchall()
    (num_groups,) = connection.execute("SELECT count(DISTINCT group_id) FROM duplicates").fetchall()[0]
    return Counts(dict(dropped), num_groups)


def _kept(connection: duckdb.DuckDBPyConnection, thumbnails: Thumbnails) -> Gallery:
    rows = connection.execute(
        f"SELECT {_PLACE}, s.caption FROM {_JOINED} WHERE d.reason IS NULL ORDER BY md5(d.uid) LIMIT ?",  # noqa: S608
        [EXAMPLES_PER_GALLERY],
    ).fetchall()
    return Gallery("Kept, at random", "kept", [_show(thumbnails, rows, kept=True)])


def _near_threshold(connection: duckdb.DuckDBPyConnection, thumbnails: Thumbnails, threshold: RuleThreshold) -> Gallery:
    """The kept samples nearest to a limit, above the dropped ones."""

    def nearest(condition: str) -> list[Any]:
        rows = f"SELECT {_PLACE}, {threshold.expression}, s.caption, d.uid FROM {_JOINED} WHERE {condition}"  # noqa: S608
        query = (
            f"SELECT * EXCLUDE (uid) FROM ({rows}) WHERE {threshold.column} IS NOT NULL "  # noqa: S608
            f"ORDER BY abs({threshold.column} - ?), md5(uid) LIMIT ?"
        )
        return connection.execute(query, [threshold.limit, EXAMPLES_PER_SIDE]).fetchall()

    kept = _show(thumbnails, map(_with_value(threshold), nearest("d.reason IS NULL")), kept=True)
    # Rows dropped by `select` were never fetched.
    under = nearest(f"d.reason = '{threshold.rule}'") if threshold.stage == "decide" else []
    dropped = _show(thumbnails, map(_with_value(threshold), under), kept=False)
    where = "metadata, before the download" if threshold.stage == "select" else "after the download"
    return Gallery(f"Nearest to {threshold.rule} {threshold.limit:g} ({where})", "threshold", [kept, dropped])


def _with_value(threshold: RuleThreshold) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def described(row: Sequence[Any]) -> Sequence[Any]:
        *place, value, caption = row
        return *place, f"{threshold.column} {value:.6g}: {caption}" if caption else f"{threshold.column} {value:.6g}"

    return described


def _dropped(connection: duckdb.DuckDBPyConnection, thumbnails: Thumbnails, reason: str, count: int) -> Gallery:
    rows = connection.execute(
        f"SELECT {_PLACE}, s.caption, s.url, i.error_message FROM {_JOINED} "  # noqa: S608
        "WHERE d.reason = ? ORDER BY md5(d.uid) LIMIT ?",
        [reason, EXAMPLES_PER_GALLERY],
    ).fetchall()
    shown = _show(thumbnails, (row[:5] for row in rows), kept=False)
    lines = (
        []
        if shown
        else [f"{shorten(without_secrets(url or ''))}  {shorten(message)}".strip() for *_, url, message in rows[:4]]
    )
    return Gallery(f"Dropped: {reason} ({count:,})", "dropped", [shown], lines)


def _never_fetched(
    connection: duckdb.DuckDBPyConnection, removed: RemovedRows, images: Path, find_image: FindImage | None
) -> Gallery:
    """Rows that the selection dropped, with their scores, without removed samples."""
    connection.execute(_UNSELECTED)
    rows = connection.execute(
        "SELECT url, caption, aesthetic, pwatermark, width, height FROM unselected ORDER BY md5(url) LIMIT ?",
        [2 * EXAMPLES_PER_GALLERY],
    ).fetchall()
    shown, lines = list[Shown](), list[str]()
    shown_rows = [row for row in rows if row[:2] not in removed]
    for number, (url, caption, aesthetic, pwatermark, width, height) in enumerate(shown_rows):
        scores = f"aesthetic {_score_text(aesthetic)}, watermark {_score_text(pwatermark)}"
        text = f"{scores}, {width}x{height}: {shorten(caption)}"
        path = find_image(url) if find_image else None
        if path is None:
            lines.append(f"{shorten(without_secrets(url or ''))}  {text}")
        else:
            image: Image.Image = decode_rgb(path.read_bytes())
            thumbnail = save_thumbnail(image, images / f"never-fetched-{number:02d}.jpg")
            shown.append(Shown(thumbnail, text, kept=False))
    return Gallery("Dropped by the metadata alone, never fetched", "dropped", [shown], lines[:4])


def _duplicates(connection: duckdb.DuckDBPyConnection, thumbnails: Thumbnails, num_groups: int) -> Gallery:
    """One row per group, the kept image first."""
    groups = connection.execute(
        "SELECT DISTINCT group_id FROM duplicates ORDER BY md5(group_id) LIMIT ?", [GROUPS]
    ).fetchall()
    rows = [_group(connection, thumbnails, group_id) for (group_id,) in groups]
    return Gallery(f"Duplicates ({num_groups:,} groups), the kept one first", "duplicates", rows)


def _group(connection: duckdb.DuckDBPyConnection, thumbnails: Thumbnails, group_id: str) -> list[Shown]:
    rows = connection.execute(
        f"SELECT {_PLACE}, i.original_width || 'x' || i.original_height, d.reason FROM {_JOINED} "  # noqa: S608
        "JOIN duplicates USING (uid) WHERE group_id = ? ORDER BY d.reason IS NOT NULL, d.uid LIMIT ?",
        [group_id, IMAGES_PER_GROUP],
    ).fetchall()
    return [
        shown
        for *place, size, reason in rows
        for shown in _show(thumbnails, [(*place, f"{reason or 'kept'}, {size}")], kept=reason is None)
    ]


def _score_text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _show(thumbnails: Thumbnails, rows: Iterable[Sequence[Any]], kept: bool) -> list[Shown]:
    """Shows rows (place first, text last), skipping those without an image."""
    found = ((thumbnails.make(*place), text) for *place, text in rows)
    return [Shown(thumbnail, shorten(text), kept) for thumbnail, text in found if thumbnail]


def shorten(text: str | None) -> str:
    """Shortens captions (up to a page long) and data: URLs (whole images)."""
    known = text or ""
    return known if len(known) <= MAX_CHARS else f"{known[: MAX_CHARS - 1]}…"


class Thumbnails:
    """Makes a report's thumbnails in `folder`, each image once."""

    def __init__(self, dataset: DatasetDir, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder

    def make(self, key: str, shard: int, offset: int | None, num_bytes: int | None) -> Path | None:
        """Makes one downloaded image's thumbnail; None if it was never fetched or is damaged."""
        path = self._folder / f"{key}.jpg"
        if path.exists():
            return path
        if offset is None or num_bytes is None:
            return None
        try:
            content = read_part(self._dataset, self._dataset.images_tar(shard), offset, num_bytes)
            return save_thumbnail(decode_rgb(content), path)
        except OSError:
            return None


def save_thumbnail(image: Image.Image, path: Path) -> Path:
    """Writes a shrunken image as JPEG."""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    image.save(path, quality=85)
    return path
