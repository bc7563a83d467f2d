"""Example pictures of what was kept and of what each rule dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
from PIL import Image

from sdtrain.data.dataset import DatasetDir
from sdtrain.data.pictures import decode_rgb, picture_extension
from sdtrain.data.tars import SampleIndex, index_samples

EXAMPLES_PER_GALLERY = 12
THUMBNAIL_PX = 160
# Of billions of rows, the first are enough to find examples among.
ROWS_TO_CHOOSE_FROM = 100_000

FindPicture = Callable[[str], Path | None]


@dataclass(frozen=True)
class Gallery:
    """Some examples of one fate: thumbnails where there is a picture, else lines of text."""

    title: str
    kept: bool
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    """(thumbnail, caption) pairs."""
    lines: list[str] = field(default_factory=list)


def galleries(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, pictures: Path, find_picture: FindPicture | None
) -> list[Gallery]:
    """Galleries of kept samples, of rows that the metadata alone ruled out, and of each later reason.

    Args:
        connection: open on the dataset's views.
        dataset: where the image shards lie.
        pictures: folder for the thumbnails.
        find_picture: a local file for a URL that was never fetched; None shows such rows as text.
    """
    found = [_kept(connection, dataset, pictures), _never_fetched(connection, pictures, find_picture)]
    reasons = connection.execute("SELECT reason, count(*) FROM drops GROUP BY reason ORDER BY reason").fetchall()
    found += [_dropped(connection, dataset, pictures, reason, count) for reason, count in reasons]
    return [gallery for gallery in found if gallery.pictures or gallery.lines]


def _kept(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, pictures: Path) -> Gallery:
    rows = connection.execute(
        "SELECT key, shard, caption FROM kept ORDER BY md5(uid) LIMIT ?", [EXAMPLES_PER_GALLERY]
    ).fetchall()
    return Gallery("Kept", kept=True, pictures=_thumbnails(dataset, rows, pictures))


def _dropped(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, pictures: Path, reason: str, count: int
) -> Gallery:
    rows = connection.execute(
        "SELECT key, d.shard, caption, url, error_message FROM drops JOIN decisions d USING (key) "
        "WHERE drops.reason = ? ORDER BY md5(drops.uid) LIMIT ?",
        [reason, EXAMPLES_PER_GALLERY],
    ).fetchall()
    shown = _thumbnails(dataset, [row[:3] for row in rows], pictures)
    lines = [] if shown else [f"{url}  {message or ''}".strip() for *_, url, message in rows[:4]]
    return Gallery(f"Dropped: {reason} ({count:,})", kept=False, pictures=shown, lines=lines)


def _never_fetched(connection: duckdb.DuckDBPyConnection, pictures: Path, find_picture: FindPicture | None) -> Gallery:
    """Rows that the selection left out, with the figures that it went by."""
    rows = connection.execute(
        "SELECT url, caption, aesthetic, pwatermark, width, height FROM (FROM metadata LIMIT ?) m "
        "ANTI JOIN selection s ON m.url = s.url ORDER BY md5(m.url) LIMIT ?",
        [ROWS_TO_CHOOSE_FROM, 2 * EXAMPLES_PER_GALLERY],
    ).fetchall()
    shown, lines = [], []
    for number, (url, caption, aesthetic, pwatermark, width, height) in enumerate(rows):
        figures = f"aesthetic {_figure(aesthetic)}, watermark {_figure(pwatermark)}, {width}x{height}: {caption or ''}"
        path = find_picture(url) if find_picture else None
        if path is None:
            lines.append(f"{url}  {figures}")
        else:
            thumbnail = _save(decode_rgb(path.read_bytes()), pictures / f"never-fetched-{number:02d}.jpg")
            shown.append((thumbnail, figures))
    return Gallery("Dropped by the metadata alone, never fetched", kept=False, pictures=shown, lines=lines[:4])


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _thumbnails(dataset: DatasetDir, rows: list[tuple[Any, ...]], pictures: Path) -> list[tuple[Path, str]]:
    """Thumbnails of (key, shard, caption) rows; those without a picture are left out."""
    shown = []
    for key, shard, caption in rows:
        picture = _read_picture(dataset.images_tar(shard), key)
        if picture is not None:
            shown.append((_save(picture, pictures / f"{key}.jpg"), caption))
    return shown


def _save(picture: Image.Image, path: Path) -> Path:
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(path, quality=85)
    return path


def _read_picture(tar: Path, key: str) -> Image.Image | None:
    """The downloaded picture of a sample; None if it was never fetched or is damaged."""
    sample = _index(tar, tar.stat().st_mtime_ns if tar.exists() else 0).get(key)
    if sample is None:
        return None
    member = sample.members[picture_extension(sample.members)]
    with tar.open("rb") as file:
        file.seek(member.offset)
        content = file.read(member.size)
    try:
        return decode_rgb(content)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _index(tar: Path, mtime_ns: int) -> dict[str, SampleIndex]:
    return {sample.key: sample for sample in index_samples(tar)}
