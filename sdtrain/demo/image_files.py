"""Draws the demo world's image files in several processes."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.demo.images import draw, spoil, watermark
from sdtrain.demo.rows import Row

_ROWS_PER_TASK = 25
# The quick settings: 2,000 images should not keep anyone waiting.
_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("jpeg", {"quality": 90}),
    "png": ("png", {"compress_level": 1}),
    "webp": ("webp", {"method": 0, "quality": 85}),
}
_COPY_QUALITY = 78


def draw_files(
    rows: list[Row], folder: Path, num_processes: int, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes each row's image to `folder` unless it is there; files appear whole or not at all.

    Args:
        rows: rows without a file, and exact copies of another row's, are passed over.
        folder: must exist.
        num_processes: processes that draw; 1 means this one.
        on_progress: called with (rows done, rows in all).
    """
    tasks = [(rows[i : i + _ROWS_PER_TASK], folder) for i in range(0, len(rows), _ROWS_PER_TASK)]
    num_done = 0
    for num_more in _mapped(tasks, num_processes):
        num_done += num_more
        if on_progress:
            on_progress(num_done, len(rows))


def _mapped(tasks: list[tuple[list[Row], Path]], num_processes: int) -> Iterator[int]:
    if num_processes == 1:
        yield from map(_draw_some, tasks)
        return
    # Not by fork: the caller may have threads.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_some, tasks)


def _draw_some(task: tuple[list[Row], Path]) -> int:
    rows, folder = task
    for row in rows:
        if row.file is None or row.kind == "exact_duplicate" or (folder / row.file).exists():
            continue
        # No fsync as in `publish`: 2,000 of them cost more than the drawing, and a kill loses nothing.
        temporary = folder / f".{row.file}.{os.getpid()}"
        temporary.write_bytes(picture_bytes(row))
        temporary.replace(folder / row.file)
    return len(rows)


def picture_bytes(row: Row) -> bytes:
    """The encoded image behind a row that has a file."""
    name, options = _ENCODINGS[row.extension]
    image = draw(row.scene, *row.size_px)
    if row.kind == "watermarked":
        image = watermark(image)
    elif row.kind == "spoiled":
        image = spoil(image)
    elif row.kind == "near_duplicate":
        # A copy is encoded a second time, and worse.
        image, options = Image.open(_encoded(image, name, options)), {"quality": _COPY_QUALITY}
    return _encoded(image, name, options).getvalue()


def _encoded(image: Image.Image, name: str, options: dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer
