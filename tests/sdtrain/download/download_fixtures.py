"""A web server of images, and datasets whose rows point at it; for the tests of downloads."""

from __future__ import annotations

import http.server
import io
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.download.stage import DOWNLOAD

SELECTION = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "uid", "url", "caption")),
        *((name, pa.int32()) for name in ("width", "height")),
        *((name, pa.string()) for name in ("md5", "sha256")),
    ]
)


def photo(seed: int, width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """A soft, colourful image; the same seed gives the same pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "jpeg", **options: Any) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "jpeg" else {}) | options)
    return buffer.getvalue()


@dataclass
class Site:
    """What a server answers: bodies by path, a status for some paths, a status for the first time only for others."""

    port: int = 0
    bodies: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    once: dict[str, int] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    pause_s: float = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def serve_photos(self, number: int, **size: int) -> list[str]:
        """Adds images; returns their URLs."""
        self.bodies |= {f"photo/{n}.jpg": encoded(photo(n, **size)) for n in range(number)}
        return [self.url(f"photo/{n}.jpg") for n in range(number)]


@contextmanager
def serve_site() -> Iterator[Site]:
    """A site on line."""
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            site.asked[path] += 1
            threading.Event().wait(site.pause_s)
            status = site.status.get(path) or (site.once.get(path) if site.asked[path] == 1 else None) or 200
            body = site.bodies.get(path, b"")
            self.send_response(status if path in site.bodies else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.port = server.server_port
    yield site
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class BuildRecipe:
    """The part of a recipe that a download reads."""

    download: DownloadConfig
    source: None = None


@dataclass
class Build:
    """A dataset with a selection, and how it is downloaded."""

    dataset: DatasetDir
    recipe: BuildRecipe

    def run(self, shards: Sequence[int] | None = None) -> list[ShardReport]:
        return run_batch(DOWNLOAD, self.dataset, self.recipe, shards or pending(DOWNLOAD, self.dataset, self.recipe))

    def rows(self) -> list[dict[str, Any]]:
        tables = sorted((self.dataset.root / "images").glob("*.parquet"))
        return [row for table in tables for row in pq.read_table(table).to_pylist()]

    def with_settings(self, **download: Any) -> Build:
        config = DownloadConfig(**self.recipe.download.model_dump() | download)
        return Build(self.dataset, BuildRecipe(config))


def prepare(
    folder: Path,
    urls: Sequence[str],
    per_shard: int = 100,
    rows: Sequence[dict[str, Any]] | None = None,
    **download: Any,
) -> Build:
    """A selection of these URLs; `rows` adds columns to each."""
    dataset, selections = DatasetDir(folder), []
    extra = rows or [{}] * len(urls)
    for shard, begin in enumerate(range(0, len(urls), per_shard)):
        chosen = [
            {
                "key": f"{1000 * shard + i:08d}",
                "uid": f"uid-{begin + i}",
                "url": url,
                "caption": f"a cäption {begin + i}",
            }
            | extra[begin + i]
            for i, url in enumerate(urls[begin : begin + per_shard])
        ]
        selections.append(dataset.selection(shard))
        selections[-1].parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(chosen, SELECTION), selections[-1])
    report = ShardReport(stage="select", shard=0, num_in=len(urls), num_out=len(urls))
    write_entry(dataset, report.model_copy(update={"outputs": describe_outputs(dataset, selections)}))
    settings = {"allow_private_hosts": True, "timeout_s": 2, "retries": 0, "image_size": 48, "connections": 8}
    return Build(dataset, BuildRecipe(DownloadConfig(**settings | {"requests_per_host_s": 1e6} | download)))


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
