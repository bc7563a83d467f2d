"""Rule filtering of Parquet rows with DuckDB, with a reason for each dropped row."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa

from filters.columns import ALIASES, SCORE_COLUMNS
from filters.rules import derived_sql, reason_case
from filters.select.faults import fault
from filters.select.metadata_files import prepare
from filters.select.named_columns import OWN_UID, carried_kinds, find_own_uids
from filters.select.pushdown import Pushdown
from filters.select.schema import MetadataFile, check_columns, normalised_sql, quoted
from filters.select.side_inputs import SideInputs, has_side_inputs, load_side_inputs
from filters.select.sql_functions import allowed_sql, register_url_check
from filters.select.text_files import first_bad_line
from filters.select_config import SelectConfig
from sdtrain.dataset.addresses import IMPORT
from sdtrain.dataset.files import raise_if_disk_full
from sdtrain.dataset.removal_ledger import LEDGER
from sdtrain.dataset.uid import uid_sql
from sdtrain.errors import UserError

# Rows per query: enough to hide its startup cost.
_ROWS_AT_ONCE = 1_000_000
# Rows per batch: few enough that memory is reused, since allocating fresh memory costs more than the work in it.
_BATCH_ROWS = 32_768
_READER_MIB = 512  # DuckDB's own memory for reading; it needs far less
_ALWAYS = ("url", "caption", "width", "height", "similarity", "hash", "pwatermark", "punsafe", "aesthetic")
# Trimming every URL would take as long as hashing it.
_TRIMMED = "CASE WHEN starts_with(url, ' ') OR ends_with(url, ' ') THEN trim(url) ELSE url END"


@dataclass(frozen=True)
class Source:
    """Metadata files and the configuration that filters their rows.

    `folder` is scratch space for what does not fit into memory; `removed` the ledger of samples that must not return;
    `is_import` says that the rows are of the user's own images, not of the web's.
    """

    files: Sequence[MetadataFile]
    select: SelectConfig
    folder: Path
    allow_private_hosts: bool
    num_threads: int
    removed: pa.Table = field(default_factory=LEDGER.empty_table)
    is_import: bool = False

    @property
    def has_side_inputs(self) -> bool:
        """Whether anything besides the metadata is read."""
        return has_side_inputs(self.select) or len(self.removed) > 0


@contextmanager
def open_passing_rows(source: Source) -> Iterator[PassingRows]:
    """Opens the passing rows of `source`, with joins and lists loaded into a database for the length of the block.

    UserError, also within the block, if a file is missing, unreadable, or lacks a column that a rule needs.
    """
    # On disk, because score files and lists may be larger than memory.
    place = source.folder / "side_inputs.duckdb" if source.has_side_inputs else ":memory:"
    with _readable(source), closing(duckdb.connect(place)) as database:
        passing = PassingRows(source, database)
        check_columns(source.files, source.select.rules, passing.null_passes)
        yield passing


class PassingRows:
    """Rows that pass the rules, see `open_passing_rows`."""

    def __init__(self, source: Source, database: duckdb.DuckDBPyConnection) -> None:
        lists = (*source.select.blocklists, *source.select.allowlists)
        if any(config.by == "uid" for config in lists):
            source = replace(source, files=find_own_uids(source.files))
        self.source = source
        self._database = database
        self.side_inputs: SideInputs | None = None
        if source.has_side_inputs:
            memory_mib = max(_READER_MIB, psutil.virtual_memory().available // 2**21)
            _set_up(database, source, source.num_threads, memory_mib)
            self.side_inputs = load_side_inputs(database, source.select, source.files, source.removed)
        joined = self.side_inputs.joins.columns if self.side_inputs else frozenset[str]()
        score_later = SCORE_COLUMNS if source.select.null_policy == "score_later" else ()
        self._joined = joined
        self._null_policy = score_later
        had = {name for file in source.files for name in file.columns} | joined
        # Always the columns of LAION's later releases; others only if a file has them.
        self.columns = [name for name in ALIASES if name in _ALWAYS or name in had]
        self.columns += map(quoted, source.select.carry)
        self._carried = dict[str, str]()
        if source.select.carry:
            with self._cursor(source.num_threads) as connection:
                self._carried = carried_kinds(connection, source.files, source.select.carry)
        if any(OWN_UID in file.carried for file in source.files):
            self._carried[OWN_UID] = "VARCHAR"

    @property
    def null_passes(self) -> set[str]:
        """Columns that a file may lack although a rule uses them."""
        return {*self._null_policy, *self._joined}

    def count(self) -> tuple[int, Counter[str]]:
        """Counts rows that pass and rows dropped by each rule, reading only the rules' columns."""
        rows, values = self._rows(self.source.files, pushdown=None)
        reason, bound = self._reason()
        query = f"SELECT {reason} AS reason, count(*) FROM ({rows}) GROUP BY ALL"  # noqa: S608
        with self._cursor(self.source.num_threads) as connection:
            counts = Counter[str | None](dict(connection.execute(query, [*bound, *values]).fetchall()))
        num_passed = counts.pop(None, 0)
        return num_passed, Counter({str(reason): count for reason, count in counts.items()})

    def each(self, consume: Callable[[pa.RecordBatch], None]) -> Counter[str]:
        """Feeds all passing rows to `consume` from several threads, in batches of `uid` and `columns`.

        Returns counts of rows that passed the rules but were dropped for their URL or by a list.
        """
        if self.side_inputs:  # one query, because each query would rebuild the hash tables of joins and lists
            with self._cursor(self.source.num_threads) as connection:
                return self._read(connection, self.source.files, None, consume)
        local, connections = threading.local(), list[Any]()

        def read(part: tuple[MetadataFile, tuple[int, int]]) -> Counter[str]:
            if not hasattr(local, "connection"):
                connections.append(self._cursor(1))
                local.connection = connections[-1].__enter__()
            return self._read(local.connection, [part[0]], part[1], consume)

        try:
            with ThreadPoolExecutor(self.source.num_threads) as threads:
                dropped = sum(threads.map(read, self._parts()), Counter[str]())
        finally:
            for connection in connections:
                connection.__exit__(None, None, None)
        whole = [file for file in self.source.files if not file.has_row_numbers]
        if whole:
            with self._cursor(self.source.num_threads) as connection:
                dropped += self._read(connection, whole, None, consume)
        return dropped

    def _read(
        self,
        connection: duckdb.DuckDBPyConnection,
        files: Sequence[MetadataFile],
        numbers: tuple[int, int] | None,
        consume: Callable[[pa.RecordBatch], None],
    ) -> Counter[str]:
        query, values = self._query(files, numbers)
        dropped = Counter[str]()
        for batch in connection.execute(query, values).to_arrow_reader(_BATCH_ROWS):
            reasons = batch["reason"]
            if reasons.null_count < len(batch):
                dropped.update(reasons.drop_null().to_pylist())
                batch = batch.filter(reasons.is_null())
            consume(batch.drop_columns(["reason"]))
        return dropped

    def _query(self, files: Sequence[MetadataFile], numbers: tuple[int, int] | None) -> tuple[str, list[Any]]:
        rows, values = self._rows(files, Pushdown(self.source.select.rules, self.null_passes), numbers)
        rule, bound = self._reason()
        passed = f"SELECT * FROM ({rows}) WHERE {rule} IS NULL"  # noqa: S608
        listed = f"SELECT *, NULL AS list_reason FROM ({passed})"  # noqa: S608
        if self.side_inputs:
            listed = self.side_inputs.listed_sql(passed)
        # URLs come after the rules, because checking them all takes longer than everything else together.
        late, _ = reason_case({}, [("url_missing", "url <> ''"), ("url_not_allowed", self._allowed())])
        query = f"""
            SELECT coalesce({late}, list_reason) AS reason, {uid_sql()} AS uid,
                {", ".join(self.columns)}
            FROM ({listed})
        """  # noqa: S608 - names are from ALIASES and RULES, values are bound
        return query, [*values, *bound]

    def _allowed(self) -> str:
        # Only an import reads files: metadata from elsewhere must not name any.
        return f"starts_with(url, '{IMPORT}')" if self.source.is_import else allowed_sql("url")

    def _rows(
        self, files: Sequence[MetadataFile], pushdown: Pushdown | None, numbers: tuple[int, int] | None = None
    ) -> tuple[str, list[Any]]:
        """Returns SQL for rows under our names, with joined scores and the derived columns that rules need."""
        compute_hash = bool(self.side_inputs and self.side_inputs.compute_hash)
        rows, values = normalised_sql(files, pushdown, compute_hash, numbers, self._carried)
        joined = self.side_inputs.joins.sql(rows) if self.side_inputs else rows
        cleaned = f"SELECT * REPLACE (coalesce(caption, '') AS caption, {_TRIMMED} AS url) FROM ({joined})"  # noqa: S608
        return f"SELECT *, {derived_sql()} FROM ({cleaned})", values  # noqa: S608

    def _reason(self) -> tuple[str, list[Any]]:
        return reason_case(self.source.select.rules, null_passes=self._null_policy)

    def _parts(self) -> Iterator[tuple[MetadataFile, tuple[int, int]]]:
        """Yields runs of whole row groups with about `_ROWS_AT_ONCE` rows, of files whose rows can be numbered."""
        sizes = self._row_groups()
        for file in self.source.files:
            begin = end = 0
            for size in sizes.get(file.path, ()):
                if end > begin and end + size - begin > _ROWS_AT_ONCE:
                    yield file, (begin, end)
                    begin = end
                end += size
            if end > begin:
                yield file, (begin, end)

    def _row_groups(self) -> dict[str, list[int]]:
        query = """
            SELECT file_name, row_group_id, any_value(row_group_num_rows) FROM parquet_metadata(?)
            GROUP BY ALL ORDER BY ALL
        """
        sizes: dict[str, list[int]] = {file.path: [] for file in self.source.files if file.has_row_numbers}
        if not sizes:
            return {}
        with self._cursor(self.source.num_threads) as connection:
            for path, _, size in connection.execute(query, [list(sizes)]).fetchall():
                sizes[path].append(size)
        return sizes

    @contextmanager
    def _cursor(self, num_threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
        """Opens a connection to the side inputs' database or, without side inputs, to a private one."""
        if self.side_inputs:
            yield self._database
            return
        with closing(duckdb.connect()) as connection:
            _set_up(connection, self.source, num_threads, _READER_MIB)
            yield connection


def _set_up(connection: duckdb.DuckDBPyConnection, source: Source, num_threads: int, memory_mib: int) -> None:
    connection.execute("SET threads = ?", [num_threads])
    connection.execute("SET memory_limit = ?", [f"{memory_mib}MiB"])
    connection.execute("SET temp_directory = ?", [str(source.folder / "spill")])
    connection.execute("SET preserve_insertion_order = false")
    register_url_check(connection, source.allow_private_hosts)
    prepare(connection, [file.path for file in source.files])


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, OSError) as error:
        raise_if_disk_full(error, source.folder)
        if isinstance(error, OSError):
            raise
        raise UserError(
            f"The metadata in {source.select.metadata} cannot be read: {_at_fault(source, error)}"
        ) from error


def _at_fault(source: Source, error: Exception) -> str:
    if "Malformed JSON" not in str(error):
        return fault(error)
    with closing(duckdb.connect(config={"threads": 1})) as connection:
        prepare(connection, [file.path for file in source.files])
        lines = (first_bad_line(connection, file.path, file.form) for file in source.files if file.form)
        return next((line for line in lines if line), fault(error))
