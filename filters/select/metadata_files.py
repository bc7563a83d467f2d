"""Metadata Parquet files, local or remote: discovery, footers, and remarks on them."""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb

from filters.columns import ALIASES, SCORE_COLUMNS, SwappedSizes
from filters.recipe import SelectConfig
from filters.rules import RULES, active_rules
from filters.select.httpfs import is_remote, load_remote, whole_location
from filters.select.schema import MetadataFile, describe_file, turn_sizes
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

PARQUET = ".parquet"
_RELIC = "__index_level_0__"
_GLOB = frozenset("*?[")


def find_metadata(pattern: str, swapped_sizes: SwappedSizes = "auto") -> list[MetadataFile]:
    """Returns the Parquet files that a recipe's `select.metadata` matches, sorted by name.

    `pattern` is a file, a folder (with subfolders) or a glob, on disk, s3://, gs:// or hf://, where a folder ends with
    a slash; or one https:// file. `${NAME}` stands for an environment variable. For `swapped_sizes` see `turn_sizes`.
    UserError if nothing matches, a file is not Parquet, or there are no rows.
    """
    if not pattern:
        raise UserError("The recipe names no metadata. Give Parquet files with LAION's columns: --metadata PATH.")
    files = turn_sizes(read_footers(find_files(pattern, "metadata. Check --metadata")), swapped_sizes)
    if not sum(file.num_rows for file in files):
        raise UserError(f"The metadata in {pattern} has no rows ({len(files)} Parquet file(s), all empty).")
    return files


def find_files(pattern: str, purpose: str, suffixes: Collection[str] = (PARQUET,)) -> list[str]:
    """Returns the paths or URLs that `pattern` matches, in folders only `suffixes`; raises `UserError` if none do."""
    pattern = whole_location(pattern, purpose)
    if is_remote(pattern):
        found, is_folder = _matching_urls(pattern, suffixes), pattern.endswith("/")
    else:
        path = Path(pattern).expanduser()
        found, is_folder = [str(p.absolute()) for p in _matching(path, suffixes)], path.is_dir()
    if not found:
        kind = f"no {' or '.join(suffixes)} file in the folder" if is_folder else "no file or folder"
        raise UserError(f"There is {kind} {pattern}, which the recipe names as {purpose}.")
    return sorted(found)


def _matching(path: Path, suffixes: Collection[str]) -> list[Path]:
    if path.is_dir():
        return [p for p in path.rglob("*") if p.suffix in suffixes and not p.name.startswith((".", "_"))]
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
    patterns = [pattern]
    if pattern.endswith("/"):
        patterns = [f"{pattern}**/*{suffix}" for suffix in suffixes]
    elif not _GLOB & set(pattern):
        return [pattern]
    with closing(duckdb.connect()) as connection:
        load_remote(connection)
        try:
            return [
                file for p in patterns for (file,) in connection.execute("SELECT file FROM glob(?)", [p]).fetchall()
            ]
        except duckdb.Error as error:
            raise UserError(f"{pattern} cannot be listed: {first_line(error)}") from error


def is_parquet(path: str) -> bool:
    """Returns whether a path or URL, possibly with a query, names a Parquet file."""
    return without_secrets(path).endswith(PARQUET)


def read_footers(paths: Sequence[str]) -> list[MetadataFile]:
    """Reads Parquet footers; raises `UserError` if a file is not Parquet or cannot be read."""
    if not paths:
        return []
    # One thread, so that `parquet_schema` returns rows in the order of files and columns.
    with closing(duckdb.connect(config={"threads": 1})) as connection:
        prepare(connection, paths)
        try:
            return _described(connection, paths)
        except duckdb.Error:
            for path in paths:  # to name the file at fault
                _try_footer(connection, path)
            raise


def prepare(connection: duckdb.DuckDBPyConnection, paths: Iterable[str]) -> None:
    """Loads httpfs into `connection` if one of the paths needs it."""
    if any(is_remote(path) for path in paths):
        load_remote(connection)


def _try_footer(connection: duckdb.DuckDBPyConnection, path: str) -> None:
    try:
        connection.execute("SELECT num_rows FROM parquet_file_metadata(?)", [path]).fetchall()
        connection.execute("SELECT name, duckdb_type FROM parquet_schema(?)", [path]).fetchall()
    except duckdb.Error as error:
        raise UserError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _described(connection: duckdb.DuckDBPyConnection, paths: Sequence[str]) -> list[MetadataFile]:
    query = "SELECT file_name, name, duckdb_type, num_children FROM parquet_schema(?)"
    nodes: dict[str, list[tuple[str, str | None, int]]] = {}
    for path, name, kind, num_children in connection.execute(query, [list(paths)]).fetchall():
        nodes.setdefault(path, []).append((name, kind, num_children or 0))
    query = "SELECT file_name, num_rows, file_size_bytes FROM parquet_file_metadata(?)"
    counts = {path: counted for path, *counted in connection.execute(query, [list(paths)]).fetchall()}
    digests = _remote_digests(connection, [path for path in paths if is_remote(path)])
    found = []
    for path in paths:
        num_rows, size = counts[path]
        digest = digests.get(path) or _footer_digest(Path(path))
        identity = (without_secrets(path).rpartition("/")[2], int(size), digest)
        found.append(describe_file(path, _top_level(nodes[path]), int(num_rows), identity))
    return found


def _top_level(nodes: Sequence[tuple[str, str | None, int]]) -> dict[str, str]:
    """Maps column names to types; the first node is the root, and children follow their parents."""
    columns, position = dict[str, str](), 1
    while position < len(nodes):
        name, kind, _ = nodes[position]
        columns[name] = kind or "NESTED"
        waiting = 1
        while waiting:
            waiting += nodes[position][2] - 1
            position += 1
    return columns


def _footer_digest(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()


def _remote_digests(connection: duckdb.DuckDBPyConnection, urls: Sequence[str]) -> dict[str, str]:
    """Digests the footers' column metadata of every row group, because DuckDB does not expose the footers' bytes."""
    if not urls:
        return {}
    query = """
        SELECT file_name, sha256(string_agg(described, chr(10) ORDER BY row_group_id, column_id)) FROM (
            SELECT file_name, row_group_id, column_id, concat_ws('|', row_group_num_rows, path_in_schema, type,
                num_values, stats_null_count, stats_min_value, stats_max_value, compression, data_page_offset,
                total_compressed_size, total_uncompressed_size) AS described
            FROM parquet_metadata(?)
        ) GROUP BY file_name
    """
    digests: dict[str, str] = dict(connection.execute(query, [list(urls)]).fetchall())
    return {url: digests.get(url, hashlib.sha256(b"").hexdigest()) for url in urls}  # an empty file has no row group


def first_line(error: Any) -> str:
    """Returns the first line of a DuckDB error; the rest may be advice for SQL authors."""
    return str(error).strip().partition("\n")[0]


def remarks_on(files: Sequence[MetadataFile], select: SelectConfig) -> list[str]:
    """Returns remarks on swapped sizes, other scales, other names, missing columns and missing values."""

    def of(num: int) -> str:
        return f"{num} of {len(files)} files"

    remarks = []
    swapped = sum(file.swapped for file in files)
    if swapped:
        why = "raw LAION release" if select.swapped_sizes == "auto" else "select.swapped_sizes"
        remarks.append(f"{of(swapped)} have WIDTH and HEIGHT swapped ({why}); turned back")
    v1 = [file.columns["aesthetic_v1"] for file in files if "aesthetic_v1" in file.columns]
    if v1:
        remarks.append(f"column {v1[0]} of {of(len(v1))} holds V1 scores; used only by min_aesthetic_v1")
    remarks += _renamed(files, of)
    remarks += _floats(files, of)
    relics = sum(_RELIC in file.all_columns for file in files)
    if relics:
        remarks.append(f"{_RELIC} of {of(relics)} ignored")
    usual = set(SCORE_COLUMNS) - {"aesthetic_v1"}  # few releases have it, and few users need it
    for column in (name for name in ALIASES if name in usual):
        num_without = sum(column not in file.columns for file in files)
        if num_without:
            remarks.append(f"{of(num_without)} have no {column}: NULL there")
    return remarks + _null_policy(select)


def _renamed(files: Sequence[MetadataFile], of: Callable[[int], str]) -> list[str]:
    """Returns columns whose name says more than ours."""
    found = Counter((ours, name) for file in files for ours, name in file.columns.items() if _tells_more(ours, name))
    return [f"{ours} is read from {name} in {of(num)}" for (ours, name), num in found.items()]


def _tells_more(ours: str, name: str) -> bool:
    plain = {ours, "caption", "text", "aesthetic_score", *(("width", "height") if ours in ("width", "height") else ())}
    return ours != "aesthetic_v1" and name.lower() in ALIASES[ours] and name.lower() not in plain


def _floats(files: Sequence[MetadataFile], of: Callable[[int], str]) -> list[str]:
    num = sum(file.types.get("width") in ("FLOAT", "DOUBLE") for file in files)
    return [f"sizes in {of(num)} are fractions; cut to whole pixels, NaN is NULL"] if num else []


def _null_policy(select: SelectConfig) -> list[str]:
    judged = {RULES[name].column for name in active_rules(select.rules)} & set(SCORE_COLUMNS)
    if not judged:
        return []
    names = ", ".join(column for column in ALIASES if column in judged)
    if select.null_policy == "drop":
        return [f"rows with NULL or NaN in {names} are dropped (null_policy: drop)"]
    return [f"rows with NULL or NaN in {names} stay until the image is scored (null_policy: score_later)"]
