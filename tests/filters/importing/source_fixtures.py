"""Sources of every kind, small, and imports of them in this process."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from filters.importing import STAGES, ImportOptions, open_import
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import begin, pending, run_batch
from sdtrain.download.source.update import Update
from tests.sdtrain.download.download_fixtures import encoded, photo

WILD = Path(__file__).parents[4] / "shared" / "data" / "wild"


def write_files(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            body = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def write_table(path: Path, images: list[bytes | None], rows_per_group: int = 2, **columns: list[Any]) -> Path:
    """As Hugging Face's `push_to_hub` writes images: a struct of their bytes and the path that they had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stored = pa.array([{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)], kind)
    pq.write_table(pa.table({"image": stored, **columns}), path, row_group_size=rows_per_group)
    return path


def jpeg(seed: int) -> bytes:
    return encoded(photo(seed))


def mixed_source(folder: Path) -> Path:
    """All kinds of sources in one folder, with what users have beside their images."""
    write_files(
        folder,
        {
            "a.jpg": jpeg(1),
            "a.txt": "\ufeffa red door\n",
            "B.JPEG": jpeg(2),
            "B.caption": "hats",
            "c d#1.png": encoded(photo(3), "png"),
            "c d#1.json": json.dumps({"caption": "mit Umläuten ä", "tags": [1]}),
            "damaged.jpg": "no image",
            "latin.jpg": jpeg(5),
            "latin.txt": "caf\xe9".encode("latin-1"),
            "again.jpg": jpeg(1),
            "._a.jpg": b"\0\5\x16\7",
            ".git/x.jpg": jpeg(6),
            "notes.md": "no image",
            "hub/metadata.jsonl": '{"file_name": "deep/e.jpg", "text": "named by metadata"}\nno json\n',
            "hub/deep/e.jpg": jpeg(7),
        },
    )
    outside = write_files(folder.parent / "outside", {"secret.jpg": jpeg(8)})
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "inside.jpg").symlink_to("a.jpg")
    os.mkfifo(folder / "pipe.jpg")
    write_tar(
        folder / "tars" / "0.tar",
        {
            "photo.v2.jpg": jpeg(10),
            "photo.v2.txt": "a picture",
            "b.JPEG": jpeg(11),
            "b.txt": "another",
            "._b.jpg": b"\0\5\x16\7",
            "c.json": json.dumps({"caption": "by json"}),
            "c.png": encoded(photo(12), "png"),
        },
    )
    write_table(folder / "zz" / "train-00000-of-00001.parquet", [jpeg(20), jpeg(21), None, jpeg(23)], text=list("pqrs"))
    return folder


MIXED_URLS = {  # URL after the source's name -> caption, and the reason for which it is dropped
    "B.JPEG": ("hats", None),
    "a.jpg": ("a red door", None),
    "again.jpg": ("", None),
    "c%20d%231.png": ("mit Umläuten ä", None),
    "damaged.jpg": ("", "not_an_image"),
    "inside.jpg": ("", None),
    "latin.jpg": ("", None),
    "hub/deep/e.jpg": ("named by metadata", None),
    "tars/0.tar#photo.v2.jpg": ("a picture", None),
    "tars/0.tar#b.JPEG": ("another", None),
    "tars/0.tar#c.png": ("by json", None),
    "zz/train-00000-of-00001.parquet#0": ("p", None),
    "zz/train-00000-of-00001.parquet#1": ("q", None),
    "zz/train-00000-of-00001.parquet#2": ("r", "source_missing"),
    "zz/train-00000-of-00001.parquet#3": ("s", None),
}
"""In the order of the source."""


def import_into(output: Path, source: Path, max_shards: int | None = None, **options: Any) -> tuple[DatasetDir, Update]:
    """Imports in this process; with `max_shards` it fails after so many shards of images, as if it had been killed."""
    options = {"samples_per_shard": 4} | options
    with open_import(ImportOptions(source, str(output), **options)) as work:
        for stage in STAGES:
            begin(stage, work.dataset)
            shards = pending(stage, work.dataset, work.recipe)
            if stage.name == "download" and max_shards is not None:
                run_batch(stage, work.dataset, work.recipe, shards[:max_shards])
                raise KeyboardInterrupt
            if shards:
                run_batch(stage, work.dataset, work.recipe, shards)
    return work.dataset, work.update


def image_rows(dataset: DatasetDir) -> list[dict[str, Any]]:
    tables = sorted(dataset.images_table(0).parent.glob("[0-9]*.parquet"))
    return [row for table in tables for row in pq.read_table(table).to_pylist()]
