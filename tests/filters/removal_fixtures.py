"""A small dataset that is built from its metadata to its latents, from a web server of photos."""

from __future__ import annotations

import hashlib
import http.server
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from filters.decide.funnel import funnel
from filters.pipeline import STAGES, stages_of
from filters.recipe import Recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.remove.apply import finish_interrupted_removal, finish_removal, start_removal
from filters.remove.plan import Removal, find_removal
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, is_whole
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import pending, run_batch

NUM_ROWS = 40
SAME_BYTES = {20: 4, 21: 5}
ALIKE = {22: 6}
MISSING, SMALL = (3, 13), (7, 17)
_NO_SAMPLES = ("removed.parquet", "removed-rows.parquet", "pack_plan.parquet")
NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))


def make_photo(number: int, quality: int = 90) -> bytes:
    """A JPEG of soft colours, another for each number."""
    colors = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    side = 60 if number in SMALL else 96
    buffer = io.BytesIO()
    Image.fromarray(colors).resize((side + 32, side), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


@contextmanager
def serve(folder: Path) -> Iterator[int]:
    """Serves a folder; gives the port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("0.0.0.0", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def write_photos(folder: Path) -> None:
    """The files of the web server."""
    folder.mkdir(parents=True)
    for number in set(range(NUM_ROWS)) - set(MISSING):
        same = SAME_BYTES.get(number, number)
        content = make_photo(ALIKE[number], 60) if number in ALIKE else make_photo(same)
        (folder / f"{number}.jpg").write_bytes(content)


def url_of(number: int, port: int) -> str:
    """Every fourth is on another host."""
    return f"http://127.0.0.{2 if number % 4 == 0 else 1}:{port}/{number}.jpg"


def caption_of(number: int) -> str:
    """Words that stand nowhere else."""
    return f"caption-of-{number:03d} ünïque"


def uid_of(number: int, port: int) -> str:
    """As the selection makes it."""
    return hashlib.md5(f"{url_of(number, port)}\n{caption_of(number)}".encode()).hexdigest()


def write_metadata(path: Path, port: int, numbers: range | list[int]) -> Path:
    """LAION's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {
        "URL": [url_of(n, port) for n in numbers],
        "TEXT": [caption_of(n) for n in numbers],
        "WIDTH": [128] * len(numbers),
        "HEIGHT": [96] * len(numbers),
    }
    pq.write_table(pa.table(columns), path)
    return path


def make_recipe(metadata: Path, **changed: Any) -> Recipe:
    """Small shards, all stages, no networks but a VAE."""
    download = {"allow_private_hosts": True, "retries": 0, "timeout_s": 2, "image_size": 64, "connections": 8}
    content: dict[str, Any] = {
        "name": "removal",
        "select": {"metadata": str(metadata), "samples_per_shard": 8},
        "download": download | {"requests_per_host_s": 1e6},
        "score": NO_MODELS,
        "duplicates": {"level": "perceptual"},
        "decide": {"rules": {"min_side": 64}},
        "pack": {"samples_per_shard": 6},
        "encode": {"vae": "demo", "resolution": 32},
    }
    return Recipe.model_validate(content | changed)


def build(dataset: DatasetDir, recipe: Recipe) -> list[ShardReport]:
    """The stages of `sdtrain build`; returns the reports of what was not finished before."""
    finish_interrupted_removal(dataset)
    record_recipe(dataset, recipe)
    reports = []
    for stage in stages_of(recipe):
        shards = pending(stage, dataset, recipe)
        reports += run_batch(stage, dataset, recipe, shards) if shards else []
    return reports


def files_with(root: Path, words: list[str]) -> list[str]:
    """Names of files that hold any of some words, as they are or compressed."""
    wanted = [word.encode() for word in words]
    return [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*"))
        if path.is_file() and any(word in content for content in _contents(path) for word in wanted)
    ]


def _contents(path: Path) -> Iterator[bytes]:
    yield path.name.encode()
    yield path.read_bytes()
    if path.suffix == ".parquet":  # whose pages are compressed
        yield repr(pq.read_table(path).to_pylist()).encode()
        yield repr(pq.read_metadata(path).metadata).encode()


def copy_of(dataset: DatasetDir, folder: Path) -> DatasetDir:
    """A copy of a dataset, with metadata of its own."""
    root = shutil.copytree(dataset.root, folder / "data")
    metadata = shutil.copytree(dataset.root.parent / "metadata", folder / "metadata")
    text = (root / "recipe.yaml").read_text().replace(str(dataset.root.parent / "metadata"), str(metadata))
    (root / "recipe.yaml").write_text(text.replace("/metadata/a.parquet", "/metadata"))
    return DatasetDir(root)


def members_of(dataset: DatasetDir) -> dict[str, bytes]:
    """All members of all tars, by stage and name."""
    found = {}
    for tar in sorted(dataset.root.rglob("*.tar")):
        with tarfile.open(tar) as file:
            for info in file:
                body = file.extractfile(info)
                found[f"{tar.parent.name}/{info.name}"] = body.read() if body else b""
    return found


def rows_of(dataset: DatasetDir) -> dict[str, dict[str, Any]]:
    """All rows of all tables, by stage and key, without the columns that say where in a tar something lies."""
    places = {"picture_offset", "offset"}
    found = {}
    for table in sorted(dataset.root.rglob("*.parquet")):
        for row in pq.read_table(table).to_pylist() if table.name not in _NO_SAMPLES else []:
            stage = table.parent.name if table.stem.isdigit() else table.stem
            found[f"{stage}/{row['uid']}"] = {name: v for name, v in row.items() if name not in places}
    return found


def remove(dataset: DatasetDir, by: Any, listed: list[object], radius: int | None = None) -> Removal:
    """Removes what a list of these entries means."""
    path = dataset.root.parent / f"{by}.txt"
    path.write_text("# a list\n" + "".join(f"{entry}\n" for entry in listed))
    removal = find_removal(dataset, path, by, radius)
    start_removal(dataset, removal)
    finish_removal(dataset)
    return removal


def statuses(dataset: DatasetDir, port: int) -> dict[int, str | None]:
    """Number -> why it is not kept."""
    numbers = {uid_of(n, port): n for n in range(2 * NUM_ROWS)}
    return {numbers[row["uid"]]: row["reason"] for row in pq.read_table(dataset.decisions).to_pylist()}


def column(dataset: DatasetDir, number: int, port: int, name: str) -> Any:
    """A value of the images' tables."""
    query = f"SELECT {name} FROM read_parquet(?) WHERE uid = ?"
    return duckdb.execute(query, [f"{dataset.root}/images/*.parquet", uid_of(number, port)]).fetchall()[0][0]


def find_removal_of(dataset: DatasetDir, uids: list[str]) -> Removal:
    """What a list of uids means."""
    path = dataset.root.parent / "some.txt"
    path.write_text("\n".join(uids))
    return find_removal(dataset, path, "uid")


def entries_for(dataset: DatasetDir, port: int, by: str, numbers: list[int]) -> list[object]:
    """What a list has to hold so that these go."""
    if by == "host":
        return ["127.0.0.2"]
    known = {"uid": lambda n: uid_of(n, port), "url": lambda n: url_of(n, port)}
    return [known.get(by, lambda n: column(dataset, n, port, by))(n) for n in numbers]


def check_consistent(dataset: DatasetDir, num_removed: int) -> None:
    """Counts add up, files are as the manifest says, and a build has nothing to do."""
    recipe = read_recipe(dataset)
    rows = funnel(dataset, recipe, STAGES)  # which says so if counts do not add up
    assert {row["reason"]: row["dropped"] for row in rows}.get("removed") == num_removed
    assert rows[-1]["remaining"] == sum(entry.num_out for entry in entries(dataset, "pack"))
    for stage in ("select", "download", "score", "dedup", "decide", "pack", "encode"):
        for entry in entries(dataset, stage):
            assert is_whole(dataset, entry)
    assert [(e.num_in, e.dropped) for e in entries(dataset, "remove")] == [(num_removed, {"removed": num_removed})]
    assert build(dataset, recipe) == []
