"""Lists the images of a source: folders of images, WebDataset tars and Hugging Face's Parquet, in any mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import SourceConfig
from sdtrain.download.source.captions import METADATA_FILES, TEXT_SUFFIXES, Captions, names_files
from sdtrain.download.source.catalogue import PLACE, Place, escape, url_of
from sdtrain.download.source.tables import open_table, read_captions
from sdtrain.download.source.tars import IMAGE_SUFFIXES, TarImages
from sdtrain.download.source.walk import Folder, Skipped, Walk
from sdtrain.errors import UserError

FOUND = pa.schema([("number", pa.int64()), ("url", pa.string()), ("caption", pa.string()), *PLACE])
NAMED = pa.schema([("number", pa.int64()), ("source_file", pa.string()), ("caption", pa.string())])
_BATCH_ROWS = 10_000
_SIDECARS = (*TEXT_SUFFIXES, "json")


@dataclass
class Scan:
    """What a scan found: images by the kind of file that holds them, and what was passed over."""

    num_images: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)


class Scanner:
    """Lists a source, in the order of its files' names; captions are read, images are not.

    `found` in `folder` gets a row for each image, `named` one for each caption in a metadata.jsonl or the like;
    `on_progress` is told the number of images from time to time.
    """

    def __init__(self, source: SourceConfig, folder: Path, on_progress: Callable[[int], None]) -> None:
        self.found, self.named = folder / "found.parquet", folder / "named.parquet"
        self._source, self._path, self._on_progress = source, Path(source.path), on_progress
        self._scan = Scan()
        self._captions = Captions(source, self._scan.skipped)

    def run(self) -> Scan:
        """Reads the source; UserError if it holds no image, or a table in it cannot be read."""
        with _Rows(self.found, FOUND) as found, _Rows(self.named, NAMED) as named:
            for folder in self._folders():
                for file, caption in self._named_in(folder):
                    named.add({"source_file": escape(file), "caption": caption})
                for image in self._images_in(folder):
                    found.add(image)
        if not self._scan.num_images.total():
            raise UserError(self._nothing())
        return self._scan

    def _folders(self) -> Iterable[Folder]:
        if self._path.is_dir():
            return Walk(self._path, self._source.follow_links, self._scan.skipped)
        return [Folder("", {self._path.name: self._path.stat().st_size})]

    def _absolute(self, name: str) -> Path:
        return Path(self._path, name) if self._path.is_dir() else self._path

    def _named_in(self, folder: Folder) -> Iterator[tuple[str, str]]:
        for name in METADATA_FILES:
            path = self._absolute(folder.join(name))
            if name in folder.files and (not name.endswith(".parquet") or names_files(path)):
                yield from self._captions.rows(path, folder.path, folder.join(name))

    def _images_in(self, folder: Folder) -> Iterator[dict[str, Any]]:
        for name, size in folder.files.items():
            file, suffix = folder.join(name), name.rpartition(".")[2].lower()
            if suffix in IMAGE_SUFFIXES and "." in name:
                yield self._row("files", self._beside(folder, name), Place(escape(file), size))
            elif suffix == "tar":
                yield from self._in_tar(file)
            elif suffix == "parquet":
                yield from self._in_table(file, size)
            elif name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
                self._scan.skipped.add("compressed archives skipped: unpack them first", file)
            elif suffix not in _SIDECARS and name not in METADATA_FILES:
                self._scan.skipped.add("files that are neither images nor captions", file)

    def _beside(self, folder: Folder, name: str) -> str | None:
        """The caption in a file of the same name, before or after the image's suffix, as kohya's scripts write it."""
        stem = name.rpartition(".")[0]
        for begin in (stem, name):
            for suffix in _SIDECARS:
                for written in (suffix, suffix.upper()):
                    beside = f"{begin}.{written}"
                    if beside in folder.files:
                        file = folder.join(beside)
                        caption = self._captions.read(self._absolute(file), file)
                        if caption is not None:
                            return caption
        return None

    def _in_tar(self, file: str) -> Iterator[dict[str, Any]]:
        for image in TarImages(self._absolute(file), file, self._captions, self._scan.skipped):
            place = Place(escape(file), None, image.offset, image.size)
            yield self._row("tars", image.caption, place, escape(image.name))

    def _in_table(self, file: str, size: int) -> Iterator[dict[str, Any]]:
        path = self._absolute(file)
        table = open_table(path, self._source, self._captions)
        if table is None:
            if file.rpartition("/")[2] not in METADATA_FILES:
                columns = ", ".join(pq.read_schema(path).names)
                self._scan.skipped.add("Parquet without a column of image bytes", f"{file}: {columns}")
            return
        if table.caption is None:
            self._scan.skipped.add("Parquet without a column of captions (--columns caption=NAME)", file)
        for row, caption in enumerate(read_captions(path, table, self._captions)):
            place = Place(escape(file), size, table_row=row, table_column=table.image)
            yield self._row("Parquet files", caption, place, str(row))

    def _row(self, kind: str, caption: str | None, place: Place, fragment: str = "") -> dict[str, Any]:
        self._scan.num_images[kind] += 1
        if self._scan.num_images.total() % _BATCH_ROWS == 0:
            self._on_progress(self._scan.num_images.total())
        return {"url": url_of(self._source.name, place.source_file, fragment), "caption": caption, **vars(place)}

    def _nothing(self) -> str:
        seen = "; ".join(self._scan.skipped.remarks()) or "the folder is empty"
        return (
            f"{self._path} holds no image that could be imported ({seen}). A source is a folder of images, WebDataset "
            "tars, or Parquet with image bytes (--columns image=NAME,caption=NAME)."
        )


class _Rows:
    """Writes numbered rows to a Parquet file, a batch in memory at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer, self._schema = pq.ParquetWriter(path, schema), schema
        self._waiting: list[dict[str, Any]] = []
        self._num_rows = 0

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row | {"number": self._num_rows})
        self._num_rows += 1
        if len(self._waiting) >= _BATCH_ROWS:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
            self._waiting = []
