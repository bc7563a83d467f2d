"""Makes the demo's world: images, metadata in LAION's columns, and server pages."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mmh3
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdtrain.dataset.files import publish, raise_if_disk_full
from sdtrain.demo.images import draw, spoil, watermark
from sdtrain.demo.rows import HOSTS, REFUSING_HOST, Row, plan_rows
from sdtrain.errors import UserError

# Raise it when the same arguments yield other images or rows.
VERSION = 1
HTTP_PORT, HTTPS_PORT = 18080, 18443
NUM_METADATA_FILES = 2
# As in laion2B-en-joined, with the aesthetic score of V2.
SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("pwatermark", pa.float32()),
        ("punsafe", pa.float32()),
        ("AESTHETIC_SCORE", pa.float32()),
    ]
)
_ROWS_PER_TASK = 25
# Fast settings: 2,000 images should not take long.
_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("jpeg", {"quality": 90}),
    "png": ("png", {"compress_level": 1}),
    "webp": ("webp", {"method": 0, "quality": 85}),
}
_COPY_QUALITY = 78


@dataclass(frozen=True)
class World:
    """A finished world on disk, for `sdtrain.demo.server.serve_world`."""

    directory: Path
    num_rows: int
    seed: int
    http_port: int
    https_port: int

    @property
    def metadata(self) -> Path:
        """Folder of Parquet files with LAION's columns."""
        return self.directory / "metadata"

    @property
    def images(self) -> Path:
        """Folder of the image files that the server sends."""
        return self.directory / "pictures"

    @property
    def pages(self) -> Path:
        """JSON of the server's response at each path."""
        return self.directory / "pages.json"

    def image_of(self, url: str) -> Path | None:
        """The file served at a URL, if any."""
        page = json.loads(self.pages.read_text()).get(urlsplit(url).path)
        path = self.images / page["file"] if page and page["file"] else None
        return path if path and path.suffix != ".html" and path.exists() else None

    @property
    def ca(self) -> Path:
        """Certificate that clients must trust; new at each start of the server."""
        return self.directory / "ca.pem"

    @property
    def marker(self) -> Path:
        """JSON with the world's settings, written last."""
        return self.directory / "world.json"


def open_world(directory: Path) -> World:
    """Opens the world in `directory`; UserError if there is none, or it is of another version."""
    content = _read_marker(directory)
    if content is None:
        raise UserError(f"There is no finished world in {directory}; `make demo` or `make_world` makes one.")
    return _world(directory, content)


def make_world(
    directory: Path,
    num_rows: int = 2000,
    seed: int = 0,
    http_port: int = HTTP_PORT,
    https_port: int = HTTPS_PORT,
    num_processes: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
    useless: float = 0.0,
) -> World:
    """Makes the world, unless it exists with the same `num_rows`, `seed` and share of `useless` alt texts.

    A killed call is resumed. The same arguments give the same bytes, as long as the ports are free on all hosts;
    otherwise, or for 0, a free port is taken. `on_progress` gets (rows drawn, total rows). UserError for too few rows,
    or a full disk.
    """
    directory = directory.absolute()
    settings: dict[str, Any] = {"version": VERSION, "num_rows": num_rows, "seed": seed}
    settings |= {"useless": useless} if useless else {}
    content = _read_marker(directory)
    if content is not None and settings.items() <= content.items() and content.get("useless", 0.0) == useless:
        return _world(directory, content)
    rows = plan_rows(num_rows, seed, useless)
    chosen_http = _free_port(http_port)
    ports = {"http_port": chosen_http, "https_port": _free_port(https_port, other_than=chosen_http)}
    world = _world(directory, settings | ports)
    try:
        world.marker.unlink(missing_ok=True)
        _keep_only_images_of(world, settings)
        draw_files(rows, world.images, num_processes, on_progress)
        _write_metadata(rows, world)
        _write_json(world.pages, {row.path: _page(row) for row in rows if _is_served(row)})
        _write_json(world.marker, settings | ports | {"rows": dict(Counter(row.kind for row in rows).most_common())})
    except OSError as error:
        raise_if_disk_full(error, directory)
        raise
    return world


def _world(directory: Path, content: dict[str, Any]) -> World:
    return World(
        directory.absolute(), content["num_rows"], content["seed"], content["http_port"], content["https_port"]
    )


def _read_marker(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / "world.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("version") == VERSION else None


def _keep_only_images_of(world: World, settings: dict[str, Any]) -> None:
    """Deletes the images if they were drawn for other settings."""
    made_for = world.images / "made_for.json"
    if made_for.exists() and made_for.read_text() == json.dumps(settings):
        return
    shutil.rmtree(world.images, ignore_errors=True)
    world.images.mkdir(parents=True)
    made_for.write_text(json.dumps(settings))


def draw_files(
    rows: list[Row], folder: Path, num_processes: int, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes missing images atomically to the existing `folder`; rows without a file and exact copies are skipped.

    One process is this one; `on_progress` gets (rows done, total rows).
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
    # No fork: the caller may have threads.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_some, tasks)


def _draw_some(task: tuple[list[Row], Path]) -> int:
    rows, folder = task
    for row in rows:
        if row.file is None or row.kind == "exact_duplicate" or (folder / row.file).exists():
            continue
        # No fsync, unlike `publish`: 2,000 of them cost more than the drawing, and a kill loses nothing.
        temporary = folder / f".{row.file}.{os.getpid()}"
        temporary.write_bytes(image_bytes(row))
        temporary.replace(folder / row.file)
    return len(rows)


def image_bytes(row: Row) -> bytes:
    """The encoded image behind a row that has a file."""
    name, options = _ENCODINGS[row.extension]
    image = draw(row.scene, *row.size_px)
    if row.kind == "watermarked":
        image = watermark(image)
    elif row.kind == "spoiled":
        image = spoil(image)
    elif row.kind == "near_duplicate":
        # A copy is encoded twice, at lower quality.
        image, options = Image.open(_encoded(image, name, options)), {"quality": _COPY_QUALITY}
    return _encoded(image, name, options).getvalue()


def _encoded(image: Image.Image, name: str, options: dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer


def _write_metadata(rows: list[Row], world: World) -> None:
    world.metadata.mkdir(exist_ok=True)
    for stale in world.metadata.glob("*.parquet"):
        stale.unlink()
    per_file = -(-len(rows) // NUM_METADATA_FILES)
    for i in range(NUM_METADATA_FILES):
        records = [_record(row, world) for row in rows[i * per_file : (i + 1) * per_file]]
        with publish(world.metadata / f"part-{i:05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(records, SCHEMA), temporary)


def _record(row: Row, world: World) -> dict[str, str | int | float | None]:
    port = world.http_port if row.scheme == "http" else world.https_port
    url = row.url or f"{row.scheme}://{row.host}:{port}{row.path}"
    return {
        "URL": url,
        "TEXT": row.text,
        "WIDTH": row.listed_px[0],
        "HEIGHT": row.listed_px[1],
        "similarity": row.similarity,
        "hash": mmh3.hash64(url + (row.text or ""))[0],
        "pwatermark": row.pwatermark,
        "punsafe": row.punsafe,
        "AESTHETIC_SCORE": row.aesthetic,
    }


def _is_served(row: Row) -> bool:
    return row.url is None and row.host != REFUSING_HOST


def _page(row: Row) -> dict[str, str | None]:
    return {"does": row.does, "file": row.file}


def _write_json(target: Path, content: object) -> None:
    with publish(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _free_port(wanted: int, other_than: int = 0) -> int:
    """`wanted` if it is free on all hosts, else a port that is."""
    for candidate in (wanted, *[0] * 20):
        port = _bindable(candidate)
        if port and port != other_than:
            return port
    raise UserError(f"No port is free on {', '.join(HOSTS)}; the demo needs these loopback addresses.")


def _bindable(port: int) -> int:
    """`port` (any, for 0) if it is free on all hosts, else 0."""
    for host in HOSTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return 0
            port = probe.getsockname()[1]
    return port
