"""metadata.duckdb: views over a whole dataset, for any DuckDB shell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import duckdb

from filters import pipeline
from filters.columns import SCORE_COLUMNS, TYPES
from filters.decide.funnel import funnel, remarks
from filters.recipe import Recipe
from filters.select.metadata_files import metadata_of, prepare
from filters.select.schema import normalised_sql
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import bulk_reads, entries, read_entry, recorded_stages
from sdtrain.dataset.stage import Stage, Table, current_entries
from sdtrain.dataset.sync import fetch_tables
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.errors import UserError
from sdtrain.redaction import LEFT_OUT, as_recorded, holds_secret

# Oldest DuckDB version that can read the file.
_STORAGE_VERSION = "v1.2.0"
# Views over the views above.
DERIVED: dict[str, str] = {
    "kept": (
        "SELECT d.uid, d.key, d.shard, s.url, s.caption, s.similarity, s.pwatermark, s.punsafe, s.aesthetic, i.width, "
        "i.height, i.original_width, i.original_height, i.sha256, i.tar "
        "FROM decisions d JOIN selection s USING (uid) JOIN images i USING (uid) WHERE d.reason IS NULL"
    ),
    "drops": (
        "SELECT d.uid, d.key, s.url, s.caption, CASE WHEN i.reason IS NOT NULL THEN 'download' "
        "WHEN d.reason = 'undecodable' THEN 'score' ELSE 'decide' END AS stage, d.reason, i.error_message "
        "FROM decisions d JOIN selection s USING (uid) LEFT JOIN images i USING (uid) WHERE d.reason IS NOT NULL"
    ),
    "score_pairs": (
        "SELECT c.uid, c.key, c.shard, "  # noqa: S608 - names are from here
        + ", ".join(f"s.{name} AS {name}_metadata, c.{name} AS {name}_image" for name in SCORE_COLUMNS)
        + " FROM scores c JOIN selection s USING (uid) WHERE c.reason IS NULL"
    ),
    "hosts": (
        "SELECT lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?([^/?#:]+)', 1)) AS host, count(*) AS tried, "
        "count(reason) AS failed, mode(reason) AS usual_reason FROM images GROUP BY host"
    ),
}

# Columns derived from a file's name: its shard's number, and the tar beside it.
_FROM_FILE = {
    "shard": "TRY_CAST(parse_filename(filename, true) AS INTEGER) AS shard",
    "tar": "regexp_replace(filename, '[.]parquet$', '.tar') AS tar",
}


def write_views(dataset: DatasetDir, recipe: Recipe) -> Path:
    """Writes metadata.duckdb, atomically replacing the old one without disturbing its readers; returns its path.

    The views use absolute paths, because DuckDB resolves relative ones against the user's working directory; call this
    again after moving a dataset. Unfinished stages give empty views.
    """
    fetch_tables(dataset)
    root = DatasetDir(dataset.root.absolute())
    with (
        bulk_reads(),
        publish(root.database) as temporary,
        closing(duckdb.connect(temporary, config={"storage_compatibility_version": _STORAGE_VERSION})) as connection,
    ):
        for name, statement in _views(connection, root, recipe):
            connection.execute(f'CREATE VIEW "{name}" AS {statement}')
        _write_funnel(connection, root, recipe)
        _write_remarks(connection, root, recipe)
        _write_stages(connection, root, recipe)
        for name, comment in _comments(recipe).items():
            kind = "TABLE" if name in ("funnel", "remarks", "stages") else "VIEW"
            connection.execute(f'COMMENT ON {kind} "{name}" IS {_literal(comment)}')
    return root.database


def _views(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe) -> Iterator[tuple[str, str]]:
    tables = TableColumns(dataset)
    yield "metadata", _metadata(connection, recipe)
    for stage in pipeline.stages_of(recipe):
        if stage.table:
            groups = tables.groups(_files(stage, dataset, recipe), may_be_missing=True)
            yield stage.table.view, _over(connection, groups, stage.table.columns)
    tables.save()
    yield from derived_views(recipe)


def derived_views(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields name and SQL of the views over other views."""
    own = "".join(f', s."{name}"' for name in recipe.select.carry)
    for name, statement in DERIVED.items():
        yield name, statement.replace(", s.aesthetic, ", f", s.aesthetic{own}, ") if name == "kept" else statement


def view_over(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, table: Table[Recipe], files: list[Path]
) -> str:
    """SQL for the view of a stage's table that reads some of its files."""
    return _over(connection, TableColumns(dataset).groups(files), table.columns)


def _files(stage: Stage[Recipe], dataset: DatasetDir, recipe: Recipe) -> list[Path]:
    """Returns the Parquet files of finished shards."""
    return [dataset.root / name for name in current_entries(stage, dataset, recipe).listed("tables")]


def _nothing(columns: Mapping[str, str]) -> str:
    nothing = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in columns.items())
    return f"SELECT {nothing} WHERE false"


def _over(connection: duckdb.DuckDBPyConnection, groups: list[list[Path]], columns: Mapping[str, str]) -> str:
    if not groups:
        return _nothing(columns)
    read, sample = (_read(groups), _read([paths[:1] for paths in groups]))
    known = {name for name, *_ in connection.execute(f"DESCRIBE {sample}").fetchall()}
    # Files of older versions, and selections of metadata with fewer columns, may lack columns.
    absent = {name: _FROM_FILE.get(name, f'NULL::{kind} AS "{name}"') for name, kind in columns.items()}
    extra = "".join(f", {sql}" for name, sql in absent.items() if name not in known)
    return read.replace("*", f"* EXCLUDE (filename){extra}", 1)


def _read(groups: list[list[Path]]) -> str:
    each = (f"SELECT * FROM read_parquet({_listed(paths)}, filename = true)" for paths in groups)  # noqa: S608
    return f"SELECT * FROM ({' UNION ALL BY NAME '.join(each)})"  # noqa: S608


def _listed(paths: list[Path]) -> str:
    """SQL for a list of files: one text that is split, as a literal for each takes 6 kB while the view is made."""
    text = "\n".join(map(str, paths))
    if text.count("\n") >= len(paths):  # a folder's name holds the separator
        return f"[{', '.join(_literal(str(path)) for path in paths)}]"
    return f"string_split({_literal(text)}, chr(10))"


def _metadata(connection: duckdb.DuckDBPyConnection, recipe: Recipe) -> str:
    try:
        files = metadata_of(recipe.select)
        prepare(connection, (file.path for file in files))
    except UserError:  # the dataset is useful without its metadata
        return _nothing(TYPES)
    if any(holds_secret(file.path) for file in files):  # a view would store the secrets
        return _nothing(TYPES)
    statement, groups = normalised_sql(files)
    for paths in groups:
        listed = ", ".join(map(_literal, paths))
        statement = re.sub(r"(read_parquet|read_csv)\(\?", lambda found: f"{found[1]}([{listed}]", statement, count=1)  # noqa: B023
    return statement


def _comments(recipe: Recipe) -> dict[str, str]:
    own = {stage.table.view: stage.table.comment for stage in pipeline.stages_of(recipe) if stage.table}
    return pipeline.OTHER_VIEWS | own | _left_out(recipe)


def _left_out(recipe: Recipe) -> dict[str, str]:
    """Explains a metadata view left empty because its URL must not be written into the database."""
    if as_recorded(recipe.select.metadata) == recipe.select.metadata and not recipe.select.metadata.endswith(LEFT_OUT):
        return {}
    return {"metadata": "Empty: the metadata's URL has a query or password, which is not written down"}


def _write_funnel(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe) -> None:
    connection.execute(
        "CREATE TABLE funnel (stage VARCHAR, reason VARCHAR, meaning VARCHAR, dropped BIGINT, remaining BIGINT)"
    )
    try:
        rows = funnel(dataset, recipe, pipeline.STAGES)
    except UserError:  # the build is in progress
        return
    connection.executemany("INSERT INTO funnel VALUES (?, ?, ?, ?, ?)", [list(row.values()) for row in rows])


def _write_remarks(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe) -> None:
    connection.execute("CREATE TABLE remarks (remark VARCHAR)")
    if read_entry(dataset, "select", 0):
        connection.executemany(
            "INSERT INTO remarks VALUES (?)", [[text] for text in remarks(dataset, recipe, pipeline.STAGES)]
        )


def _write_stages(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe) -> None:
    connection.execute(
        "CREATE TABLE stages (stage VARCHAR, shard INTEGER, num_in BIGINT, num_out BIGINT, seconds DOUBLE, "
        "bytes BIGINT, dropped JSON, uses_gpu BOOLEAN, finished_at TIMESTAMP)"
    )
    known = {stage.name: stage for stage in pipeline.STAGES}
    for name in recorded_stages(dataset):
        stage = known.get(name)
        found = current_entries(stage, dataset, recipe) if stage else entries(dataset, name)
        connection.register("finished", found.table)
        connection.execute(
            "INSERT INTO stages SELECT ?, shard, num_in, num_out, seconds, num_bytes, to_json(dropped), ?, "
            "make_timestamp(CAST(nullif(finished_at, 0) * 1e6 AS BIGINT)) FROM finished",
            [name, stage is not None and stage.uses_gpu],
        )
        connection.unregister("finished")


def _literal(text: str) -> str:
    """Quotes text as a SQL literal: views cannot hold bound values."""
    return "'" + text.replace("'", "''") + "'"
