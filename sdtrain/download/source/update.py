"""Compares a source with what was imported from it before, and lists what is new in another catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import duckdb

from sdtrain.dataset.config import SourceConfig
from sdtrain.dataset.files import publish, raise_if_disk_full, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.sync import push_files
from sdtrain.download.source.catalogue import (
    PLACE,
    ROWS_PER_GROUP,
    catalogue_files,
    last_source_row,
    write_catalogue,
)
from sdtrain.download.source.scan import Scan, Scanner
from sdtrain.errors import UserError

_NUM_NAMED = 5
_MEMORY = "1GiB"
_COLUMNS = ", ".join(["url", "caption", *PLACE.names])
# A name stands twice in a tar that was appended to; a file may stand in several metadata files.
_NOW = """
    CREATE TABLE now AS SELECT f.* REPLACE (coalesce(f.caption, n.caption) AS caption)
    FROM (SELECT * FROM read_parquet($found) QUALIFY row_number() OVER (PARTITION BY url ORDER BY number) = 1) f
    LEFT JOIN (
        SELECT source_file, arg_min(caption, number) AS caption FROM read_parquet($named) GROUP BY source_file
    ) n ON n.source_file = f.source_file AND f.member_offset IS NULL AND f.table_row IS NULL
"""
_CHANGED = """
    SELECT k.url FROM known k JOIN now n USING (url) WHERE k.caption IS DISTINCT FROM n.caption
    OR k.source_bytes IS DISTINCT FROM n.source_bytes OR k.member_bytes IS DISTINCT FROM n.member_bytes
"""


@dataclass(frozen=True)
class Named:
    """Some images: their number, and the URLs of the first few."""

    number: int
    urls: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number:,} ({', '.join(self.urls)}{', …' if self.number > len(self.urls) else ''})"


@dataclass(frozen=True)
class Update:
    """A source compared with what was imported before.

    `num_new` images were added to the dataset's list. The `missing` are no longer in the source, and the `changed` have
    another size or caption there: the dataset keeps both as they were.
    """

    num_new: int
    num_known: int
    missing: Named
    changed: Named
    skipped: list[str]

    def sentences(self) -> list[str]:
        """Lines for terminal and log."""
        before = f", {self.num_known:,} known before" if self.num_known else ""
        lines = [f"source: {self.num_new:,} new image{'' if self.num_new == 1 else 's'}{before}"]
        if self.missing.number:
            lines.append(f"no longer in the source, kept in the dataset: {self.missing}")
        if self.changed.number:
            lines.append(f"changed in the source, kept as imported (a new --output takes them in): {self.changed}")
        return [*lines, *self.skipped]


def update_catalogues(
    dataset: DatasetDir, source: SourceConfig, on_progress: Callable[[int], None] = lambda number: None
) -> Update:
    """Scans the source and appends a catalogue of its new images, if there are any, to the locked dataset's.

    UserError if the source has no image, or none of those that were imported before, and so is probably another one.
    """
    known = catalogue_files(dataset.catalogues)
    with scratch(dataset.root, "import") as folder:
        scanner = Scanner(source, folder, on_progress)
        scan = scanner.run()
        with closing(duckdb.connect(str(folder / "compare.duckdb"))) as connection:
            connection.execute("SET memory_limit = ?", [_MEMORY])
            connection.execute("SET temp_directory = ?", [str(folder / "spill")])
            try:
                return _compare(connection, dataset, source, scanner, scan, known)
            except duckdb.Error as error:
                raise_if_disk_full(error, dataset.root)
                raise


def _compare(
    connection: duckdb.DuckDBPyConnection,
    dataset: DatasetDir,
    source: SourceConfig,
    scanner: Scanner,
    scan: Scan,
    known: list[Path],
) -> Update:
    named = {"named": str(scanner.named)}
    connection.execute(_NOW, {"found": str(scanner.found), **named})
    connection.execute(
        "CREATE TABLE named AS SELECT source_file FROM read_parquet($named)", {"named": str(scanner.named)}
    )
    rows = "read_parquet($known)" if known else "now WHERE false"
    connection.execute(
        f"CREATE TABLE known AS SELECT {_COLUMNS} FROM {rows}",  # noqa: S608 - names are from here
        {"known": [str(path) for path in known]} if known else {},
    )
    missing = _named(connection, "SELECT url FROM known ANTI JOIN now USING (url)")
    num_known = _count(connection, "SELECT url FROM known")
    if num_known and missing.number == num_known:
        raise UserError(
            f"{dataset} was imported from another source: none of its {num_known:,} images is in {source.path}, such "
            f"as {missing.urls[0]}. Choose another --output, and train on both (`data.sources`)."
        )
    skipped = [*scan.skipped.remarks(), *_of_captions(connection)]
    new = "SELECT number, url FROM now ANTI JOIN known USING (url)"
    num_new = _count(connection, new)
    if num_new:
        path, first = dataset.catalogue(len(known)), last_source_row(known[-1]) + 1 if known else 0
        kinds = ", ".join(f"{number:,} in {kind}" for kind, number in sorted(scan.num_images.items()))
        remarks = [f"imported from {source.path}: {num_new:,} images (the source has {kinds})", *skipped]
        ordered = f"SELECT {_COLUMNS} FROM now ANTI JOIN known USING (url) ORDER BY number"  # noqa: S608
        with publish(path) as temporary:
            batches = connection.execute(ordered).to_arrow_reader(ROWS_PER_GROUP)
            write_catalogue(temporary, batches, first, remarks)
        push_files(dataset, path)
    return Update(num_new, num_known, missing, _named(connection, _CHANGED), skipped)


def _of_captions(connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Sentences about images without captions, and captions without images."""
    without = _named(connection, "SELECT url FROM now WHERE coalesce(caption, '') = ''")
    if without.number:
        yield f"images without a caption (--require-caption drops them): {without}"
    lost = _named(connection, "SELECT source_file AS url FROM named ANTI JOIN now USING (source_file)")
    if lost.number:
        yield f"files named by metadata that are not there: {lost}"


def _named(connection: duckdb.DuckDBPyConnection, query: str) -> Named:
    urls = connection.execute(f"SELECT url FROM ({query}) ORDER BY url LIMIT {_NUM_NAMED}").fetchall()  # noqa: S608
    return Named(_count(connection, query), tuple(url for (url,) in urls))


def _count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM ({query})").fetchall()[0][0])  # noqa: S608
