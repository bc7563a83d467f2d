"""Example pictures of what was kept and of what each rule dropped."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import duckdb
from PIL import Image

from sdtrain.data.dataset import DatasetDir
from sdtrain.data.tars import index_samples

EXAMPLES_PER_GALLERY = 12
THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Gallery:
    """Some examples of one fate: thumbnails where a picture was fetched, else lines of text."""

    title: str
    kept: bool
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    """(thumbnail, caption) pairs."""
    lines: list[str] = field(default_factory=list)


def galleries(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, pictures: Path) -> list[Gallery]:
    """A gallery of kept samples and one for each reason that dropped some.

    Args:
        connection: open on the dataset's views.
        dataset: where the image shards lie.
        pictures: folder for the thumbnails.
    """
    kept = connection.execute(
        "SELECT key, caption FROM kept ORDER BY md5(uid) LIMIT ?", [EXAMPLES_PER_GALLERY]
    ).fetchall()
    found = [Gallery("Kept", kept=True, pictures=_thumbnails(dataset, kept, pictures))]
    reasons = connection.execute("SELECT reason, count(*) FROM drops GROUP BY reason ORDER BY reason").fetchall()
    for reason, count in reasons:
        rows = connection.execute(
            "SELECT key, caption, url, error_message FROM drops WHERE reason = ? ORDER BY md5(uid) LIMIT ?",
            [reason, EXAMPLES_PER_GALLERY],
        ).fetchall()
        shown = _thumbnails(dataset, [row[:2] for row in rows], pictures)
        lines = [] if shown else [f"{url}  {message or ''}".strip() for _, _, url, message in rows[:4]]
        found.append(Gallery(f"Dropped: {reason} ({count:,})", kept=False, pictures=shown, lines=lines))
    return found


def _thumbnails(dataset: DatasetDir, rows: list[tuple[str, str]], pictures: Path) -> list[tuple[Path, str]]:
    shown = []
    for key, caption in rows:
        picture = _read_picture(dataset, key)
        if picture is None:
            continue
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        path = pictures / f"{key}.jpg"
        picture.convert("RGB").save(path, quality=85)
        shown.append((path, caption))
    return shown


def _read_picture(dataset: DatasetDir, key: str) -> Image.Image | None:
    """The downloaded picture of a sample; None if it was never fetched or is damaged."""
    for path in sorted((dataset.root / "images").glob("*.tar")):
        members = _index(path).get(key)
        if members:
            break
    else:
        return None
    extension = next(e for e in members if e in ("jpg", "png", "webp"))
    offset, num_bytes = members[extension]
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(num_bytes)
    try:
        return Image.open(io.BytesIO(content))
    except OSError:
        return None


@lru_cache(maxsize=256)
def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    return index_samples(path)
