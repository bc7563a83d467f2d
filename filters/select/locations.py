"""Files that a path, folder, glob or URL of a recipe means."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path

import duckdb

from filters.select.faults import first_line
from filters.select.httpfs import is_remote, load_remote, whole_location
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

PARQUET = ".parquet"
_TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = tuple(suffix + compression for suffix in _TEXTS for compression in ("", *COMPRESSIONS))
"""Endings of metadata in text, in either case."""
_GLOB = frozenset("*?[")


def find_files(pattern: str, purpose: str, suffixes: Collection[str] = (PARQUET,)) -> list[str]:
    """Returns the paths or URLs that `pattern` matches, sorted; in folders only `suffixes`, in either case.

    A folder in a store (s3://bucket/folder) may end with a slash or not. UserError if there are none.
    """
    pattern = whole_location(pattern, purpose)
    if is_remote(pattern):
        found, is_folder = _matching_urls(pattern, suffixes), pattern.endswith("/")
    else:
        path = Path(pattern).expanduser()
        found, is_folder = [str(p.absolute()) for p in _matching(path, suffixes)], path.is_dir()
    if not found:
        plain = [suffix for suffix in suffixes if not suffix.endswith(tuple(COMPRESSIONS))]
        listed = " or ".join(filter(None, [", ".join(plain[:-1]), plain[-1]]))
        kind = f"no {listed} file in the folder" if is_folder else "no file or folder"
        raise UserError(f"There is {kind} {pattern}, which the recipe names as {purpose}.")
    return sorted(found)


def ends_with(path: str, suffixes: Collection[str]) -> bool:
    """Returns whether a path or URL, possibly with a query, ends with one of `suffixes`, in either case."""
    return without_secrets(path).lower().endswith(tuple(suffixes))


def without_texts_beside_parquet(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns the Parquet files of a folder that has some, else all `paths` that `pattern` matched."""
    is_glob = bool(_GLOB & set(without_secrets(pattern)))
    return list(paths) if is_glob else [path for path in paths if is_parquet(path)] or list(paths)


def is_parquet(path: str) -> bool:
    """Returns whether a path or URL, possibly with a query, names a Parquet file."""
    return ends_with(path, (PARQUET,))


def _matching(path: Path, suffixes: Collection[str]) -> list[Path]:
    if path.is_dir():
        found = (p for p in path.rglob("*") if not p.name.startswith((".", "_")))
        return [p for p in found if ends_with(p.name, suffixes)]
    if path.is_file():
        return [path]
    # Path.glob refuses absolute patterns.
    return [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]  # noqa: PTH207


def _matching_urls(pattern: str, suffixes: Collection[str]) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        # Web servers list nothing, and `?` begins a query there.
        if _GLOB - {"?"} & set(without_secrets(pattern)) or pattern.endswith("/"):
            raise UserError(f"{pattern} must be one file: web servers cannot be asked for a list.")
        return [pattern]
    if pattern.endswith("/"):
        return _listed(f"{pattern}**/*", suffixes)
    if _GLOB & set(pattern):
        return _listed(pattern, ("",))
    if ends_with(pattern, suffixes):
        return [pattern]
    return _listed(f"{pattern}/**/*", suffixes) or [pattern]


def _listed(pattern: str, suffixes: Collection[str]) -> list[str]:
    with closing(duckdb.connect()) as connection:
        load_remote(connection)
        try:
            found = connection.execute("SELECT file FROM glob(?)", [pattern]).fetchall()
        except duckdb.Error as error:
            raise UserError(f"{pattern} cannot be listed: {first_line(error)}") from error
    return [file for (file,) in found if ends_with(file, suffixes)]
