"""SELECT: metadata rows -> the rows worth downloading, shuffled, in exact shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import duckdb
import psutil

from filters.recipe import Recipe, SelectConfig
from filters.rules import reason_case
from filters.schema import ALIASES, SCORES, TYPES, MetadataFile, check_columns, find_metadata
from filters.urls import allowed_sql, register_url_check
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish, raise_if_disk_full, scratch
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint
from sdtrain.data.stage import Stage
from sdtrain.errors import UserError

_COLUMNS = ", ".join(ALIASES)
_SHARD_DIGITS = 5  # as img2dataset's oom_shard_count


def key_digits(samples_per_shard: int) -> int:
    """How many digits of a key count samples within a shard, as in img2dataset."""
    return math.ceil(math.log10(samples_per_shard))


def shard_key(shard: int, index: int, samples_per_shard: int) -> str:
    """The key of the sample at `index` of `shard`."""
    digits = key_digits(samples_per_shard)
    return f"{10**digits * shard + index:0{digits + _SHARD_DIGITS}d}"


def select_rows(
    dataset: DatasetDir, select: SelectConfig, allow_private_hosts: bool = False, num_threads: int | None = None
) -> ShardReport:
    """Writes the selection of `select` into the dataset, the same bytes for any number of threads.

    A row without a caption stays, with an empty one, as in img2dataset; `min_caption_chars` drops it.

    Raises:
        UserError: the metadata cannot be read, lacks a column, or no row survives.
    """
    files = find_metadata(select.metadata)
    score_later = SCORES if select.null_policy == "score_later" else ()
    check_columns(files, select.rules, missing_passes=score_later)
    with scratch(dataset.root, "select") as folder, closing(_connect(folder, num_threads)) as connection:
        register_url_check(connection, allow_private_hosts)
        try:
            _judge(connection, files, select)
            dropped, num_chosen = _choose(connection, select)
        except duckdb.Error as error:
            raise_if_disk_full(error, dataset.selection(0).parent)
            raise UserError(f"The metadata in {select.metadata} cannot be read: {error}") from error
        if not num_chosen:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
            raise UserError(f"No row of {select.metadata} is left ({counts}). Loosen the rules, or check the metadata.")
        outputs = _write_shards(connection, dataset, num_chosen, select.samples_per_shard)
    _delete_others(dataset, outputs)
    return ShardReport(
        stage="select",
        shard=0,
        num_in=num_chosen + sum(dropped.values()),
        num_out=num_chosen,
        dropped=dropped,
        outputs=describe_outputs(dataset, outputs),
    )


def normalised_sql(files: Sequence[MetadataFile]) -> tuple[str, list[list[str]]]:
    """SQL for the rows of all files under our column names and types, and the file lists to bind.

    Files of one schema are read together; what a file does not have is NULL.
    """
    groups: dict[tuple[tuple[str, str], ...], list[MetadataFile]] = {}
    for file in files:
        groups.setdefault((*file.columns.items(), *(("", kind) for kind in file.types)), []).append(file)
    parts, paths = [], []
    for group in groups.values():
        columns = [_column_sql(ours, group[0].columns.get(ours)) for ours in ALIASES]
        parts.append(f"SELECT {', '.join(columns)} FROM read_parquet(?, hive_partitioning = false)")  # noqa: S608
        paths.append([str(file.path) for file in group])
    return " UNION ALL ".join(parts), paths


def _column_sql(ours: str, theirs: str | None) -> str:
    kind = TYPES[ours]
    if theirs is None:
        return f"NULL::{kind} AS {ours}"
    quoted = '"' + theirs.replace('"', '""') + '"'
    if kind == "DOUBLE":
        value = f"TRY_CAST({quoted} AS DOUBLE)"
        return f"CASE WHEN isfinite({value}) THEN {value} END AS {ours}"
    # Sizes that pandas made floats come with NaN, which no integer can hold: NULL.
    return f"TRY_CAST({quoted} AS {kind}) AS {ours}"


def _connect(folder: Path, num_threads: int | None) -> duckdb.DuckDBPyConnection:
    # A database on disk, not in memory, so that tables are compressed and may be larger than memory.
    connection = duckdb.connect(folder / "select.duckdb")
    connection.execute("SET temp_directory = ?", [str(folder / "spill")])
    connection.execute("SET memory_limit = ?", [f"{max(256, psutil.virtual_memory().available // 2**21)}MiB"])
    if num_threads:
        connection.execute("SET threads = ?", [num_threads])
    return connection


def _judge(connection: duckdb.DuckDBPyConnection, files: Sequence[MetadataFile], select: SelectConfig) -> None:
    """Makes table `judged`: a row for each metadata row with its first reason, emptied where there is one."""
    rows, paths = normalised_sql(files)
    first = [("url_missing", "url <> ''"), ("url_not_allowed", allowed_sql("url"))]
    null_passes = SCORES if select.null_policy == "score_later" else ()
    reason, values = reason_case(select.rules, first, null_passes)
    kept = ", ".join(f"CASE WHEN reason IS NULL THEN {name} END AS {name}" for name in ALIASES)
    statement = f"""
        CREATE TABLE judged AS
        WITH named AS ({rows}),
        cleaned AS (
            SELECT * REPLACE (trim(url) AS url, coalesce(caption, '') AS caption), length(coalesce(caption, ''))
                AS caption_chars, CASE WHEN width > 0 AND height > 0 THEN least(width, height) END AS side,
                greatest(width, height) / side AS aspect_ratio
            FROM named
        ),
        reasoned AS (SELECT *, {reason} AS reason FROM cleaned)
        SELECT reason, CASE WHEN reason IS NULL THEN md5(url || chr(10) || caption) END AS uid, {kept} FROM reasoned
    """  # noqa: S608 - names are from ALIASES and RULES, values are bound
    connection.execute(statement, [*paths, *values])


def _choose(connection: duckdb.DuckDBPyConnection, select: SelectConfig) -> tuple[dict[str, int], int]:
    """Makes table `chosen` with the surviving rows in shuffled order; returns drops by reason and the rows to use."""
    # Rows with one uid are neighbours in this order, and the first of them is always the same one.
    order = f"shuffle, {_COLUMNS}"
    connection.execute(
        f"""
        CREATE TABLE chosen AS
        WITH shuffled AS (SELECT * EXCLUDE (reason), md5(uid || ?) AS shuffle FROM judged WHERE reason IS NULL),
        single AS (SELECT * FROM shuffled QUALIFY uid IS DISTINCT FROM lag(uid) OVER (ORDER BY {order}))
        SELECT row_number() OVER (ORDER BY shuffle) - 1 AS position, * FROM single ORDER BY position
        """,  # noqa: S608 - names are from ALIASES
        [str(select.seed)],
    )
    counted = connection.execute("SELECT reason, count(*) FROM judged GROUP BY reason ORDER BY reason").fetchall()
    dropped = {reason: count for reason, count in counted if reason is not None}
    num_passed = sum(count for reason, count in counted if reason is None)
    num_single = _one(connection, "SELECT count(*) FROM chosen")
    num_chosen = min(num_single, select.limit or num_single)
    late = {"duplicate_row": num_passed - num_single, "over_limit": num_single - num_chosen}
    return dropped | {reason: count for reason, count in late.items() if count}, num_chosen


def _write_shards(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, num_rows: int, samples_per_shard: int
) -> list[Path]:
    digits = key_digits(samples_per_shard)
    key_format = f"{{:0{digits + _SHARD_DIGITS}d}}"
    written = []
    for shard in range(math.ceil(num_rows / samples_per_shard)):
        begin, end = shard * samples_per_shard, min(num_rows, (shard + 1) * samples_per_shard)
        with publish(dataset.selection(shard)) as temporary:
            connection.execute(
                f"""
                COPY (
                    SELECT format($key_format, position - $begin + $first) AS key, uid, {_COLUMNS} FROM chosen
                    WHERE position >= $begin AND position < $end ORDER BY position
                ) TO $file (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {max(2048, samples_per_shard)})
                """,  # noqa: S608 - names are from ALIASES
                {
                    "key_format": key_format,
                    "first": 10**digits * shard,
                    "begin": begin,
                    "end": end,
                    "file": str(temporary),
                },
            )
        written.append(dataset.selection(shard))
    return written


def _delete_others(dataset: DatasetDir, written: Sequence[Path]) -> None:
    """Deletes shards of an earlier, larger selection."""
    for path in set(dataset.selection(0).parent.glob("*.parquet")) - set(written):
        path.unlink()


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    config = recipe.select.model_dump(mode="json", exclude={"metadata", "rules"})
    # As pairs, because the order of the rules decides the reasons.
    config |= {"rules": list(recipe.select.rules.items()), "private": recipe.download.allow_private_hosts}
    files = sorted(file.identity for file in find_metadata(recipe.select.metadata))
    return fingerprint("select/1", config | {"files": files})


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    # A selection that is being replaced must not pass for finished if this is killed half way.
    dataset.manifest_entry("select", 0).unlink(missing_ok=True)
    yield select_rows(dataset, recipe.select, recipe.download.allow_private_hosts)


SELECT: Stage[Recipe] = Stage("select", lambda dataset, recipe: [0], _fingerprint, _run)
