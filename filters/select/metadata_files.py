"""Metadata files, local or remote: discovery, columns, and remarks on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import duckdb

from filters.columns import ALIASES, SCORE_COLUMNS, SwappedSizes
from filters.rules import RULES, active_rules
from filters.select.faults import first_line
from filters.select.httpfs import is_remote, load_remote
from filters.select.locations import PARQUET, TEXT_SUFFIXES, find_files, without_texts_beside_parquet
from filters.select.named_columns import find_carried, map_columns
from filters.select.schema import MetadataFile, describe_file, turn_sizes
from filters.select.text_files import describe_text, is_text
from filters.select_config import SelectConfig
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

_RELIC = "__index_level_0__"
_PURPOSE = "metadata. Check --metadata"


def metadata_of(select: SelectConfig) -> list[MetadataFile]:
    """Returns the files of a recipe's metadata, see `find_metadata`."""
    return find_carried(find_metadata(select.metadata, select.swapped_sizes, select.columns), select.carry)


def find_metadata(
    pattern: str, swapped_sizes: SwappedSizes = "auto", columns: Mapping[str, str] | None = None
) -> list[MetadataFile]:
    """Returns the files that a recipe's `select.metadata` matches, sorted by name: Parquet, CSV, TSV or JSON lines.

    `pattern` is a file, a folder (with subfolders) or a glob, on disk, s3://, gs:// or hf://; or one https:// file. In
    a folder that holds Parquet, other files are left out. `${NAME}` stands for an environment variable. `columns` maps
    our names to the files', see `map_columns`; for `swapped_sizes` see `turn_sizes`. UserError if nothing matches, a
    file cannot be read, or Parquet files have no rows.
    """
    if not pattern:
        raise UserError("The recipe names no metadata. Give files with LAION's columns: --metadata PATH.")
    files = map_columns(describe_files(_metadata_paths(pattern)), columns or {})
    if num_rows_of(files) == 0:
        raise UserError(f"The metadata in {pattern} has no rows ({len(files)} file(s), all empty).")
    return turn_sizes(files, swapped_sizes)


def _metadata_paths(pattern: str) -> list[str]:
    return without_texts_beside_parquet(pattern, find_files(pattern, _PURPOSE, (PARQUET, *TEXT_SUFFIXES)))


def num_rows_of(files: Iterable[MetadataFile]) -> int | None:
    """Returns the number of rows of all files; None if one is text, which has to be read for it."""
    numbers = [file.num_rows for file in files]
    return None if None in numbers else sum(number for number in numbers if number is not None)


def describe_files(paths: Sequence[str]) -> list[MetadataFile]:
    """Describes files of Parquet, CSV, TSV or JSON lines, in their order; raises `UserError` if one is none of them."""
    texts = [path for path in paths if is_text(path)]
    described = {file.path: file for file in read_footers([path for path in paths if path not in set(texts)])}
    with closing(duckdb.connect(config={"threads": 1})) as connection:
        prepare(connection, texts)
        for path in texts:
            form, types, identity = describe_text(connection, path)
            described[path] = replace(describe_file(path, types, None, identity), form=form)
    return [described[path] for path in paths]


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


def remarks_on(files: Sequence[MetadataFile], select: SelectConfig) -> list[str]:
    """Returns remarks on swapped sizes, other scales, other names, missing columns and missing values."""

    def of(num: int) -> str:
        return f"{num} of {len(files)} files"

    remarks = _left_out(files, select)
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


def _left_out(files: Sequence[MetadataFile], select: SelectConfig) -> list[str]:
    """Tells of text beside the Parquet files of a folder."""
    if not select.metadata or any(file.form for file in files):
        return []
    num = len(find_files(select.metadata, _PURPOSE, (PARQUET, *TEXT_SUFFIXES))) - len(files)
    return [f"{num} files of text beside {len(files)} Parquet files not read"] if num > 0 else []


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
    judged = {RULES[name].column for name in active_rules(select.rules) if name in RULES} & set(SCORE_COLUMNS)
    if not judged:
        return []
    names = ", ".join(column for column in ALIASES if column in judged)
    if select.null_policy == "drop":
        return [f"rows with NULL or NaN in {names} are dropped (null_policy: drop)"]
    return [f"rows with NULL or NaN in {names} stay until the image is scored (null_policy: score_later)"]
