"""Measures who and what a dataset's captions speak of, their languages and their hosts' countries, filter by filter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import duckdb
from pydantic import Field

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import bulk_reads, entries, newest_change_ns, selected_entries
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.model_card.caption_facts import CaptionFacts, measure_captions
from sdtrain.model_card.word_lists import WordLists, language_sql, pattern, words_sql
from sdtrain.settings import Settings

MAX_ROWS, MAX_SHARDS = 1_000_000, 2_000
"""Of a dataset of more selected rows or shards, a part drawn at random is measured."""
NO_COUNTRY = "no country"
SELECTED, DOWNLOADED, KEPT = "selected", "downloaded", "kept"
_HOST = "lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?([^/?#:]+)', 1))"
# The last label of a name, if it has two letters as only countries' have; not of an address.
_COUNTRY = f"coalesce(nullif(regexp_extract({_HOST}, '[.]([a-z][a-z])[.]?$', 1), ''), '{NO_COUNTRY}')"


class Counts(Settings):
    """Rows with a property, at each level."""

    name: str
    nums: tuple[int, ...]


class Representation(Settings):
    """What was measured of one dataset.

    Attributes:
        name: the dataset's.
        key: of the tables and word lists that were read.
        word_lists: their description.
        num_rows: rows that were selected.
        is_sample: whether a part of the shards was read.
        levels: selected, downloaded, after each filter of the images, kept; with the number of measured rows left.
        groups: theme -> counts.
        crossed: of the kept captions with a group of the first theme, how many speak of each of the second.
        captions: of kept images by source, where the dataset has several of each.
    """

    name: str
    key: str
    word_lists: str = ""
    num_rows: int
    is_sample: bool
    levels: list[Counts]
    languages: list[Counts] = Field(default=[])
    countries: list[Counts] = Field(default=[])
    groups: dict[str, list[Counts]] = Field(default={})
    crossed: dict[str, dict[str, int]] = Field(default={})
    captions: list[CaptionFacts] = Field(default=[])

    @property
    def num_measured(self) -> int:
        """Rows that were read."""
        return self.levels[0].nums[0]

    def shares(self, counts: Counts, level: str) -> float | None:
        """Share of the rows at a level, 0 to 1; None if it has none."""
        at = [one.name for one in self.levels].index(level)
        total = self.levels[at].nums[0]
        return counts.nums[at] / total if total else None


def key_of(dataset: DatasetDir, lists: WordLists) -> str:
    """Changes with the tables that `measure` reads, and with the lists."""
    stages = ["download", "decide", *(["caption"] if entries(dataset, "caption") else [])]
    return " ".join([*(str(newest_change_ns(dataset, stage)) for stage in stages), lists.digest()])


def measure(dataset: DatasetDir, name: str, lists: WordLists) -> Representation | None:
    """Reads the tables of images once, at most `MAX_ROWS` rows of them, beside their decisions.

    None if the dataset has no decisions yet, or its tables are not on this machine.
    """
    with bulk_reads():
        downloaded = selected_entries(dataset, "download")
    shards, is_sample = _chosen(downloaded.table["num_in"].to_pylist(), downloaded.shards.tolist())
    paths = [path for path in map(dataset.images_table, shards) if path.exists()]
    if not paths or not dataset.decisions.exists():
        return None
    with connected() as connection:
        _read(connection, dataset, paths, shards if is_sample else None, lists)
        statuses = _filters(dataset.database, connection)
        num_rows = int(downloaded.table["num_in"].to_numpy().sum())
        return Representation(
            name=name,
            key=key_of(dataset, lists),
            word_lists=lists.description,
            num_rows=num_rows,
            is_sample=is_sample,
            levels=_levels(connection, statuses),
            languages=_by_column(connection, "language", statuses),
            countries=_by_column(connection, "country", statuses),
            groups=_groups(connection, lists, statuses),
            crossed=_crossed(connection, lists),
            captions=_captions(connection, dataset, shards, lists),
        )


def _chosen(nums: Sequence[int], shards: Sequence[int]) -> tuple[list[int], bool]:
    """Shards to read: all, or some drawn at random, the same ones each time."""
    if sum(nums) <= MAX_ROWS and len(shards) <= MAX_SHARDS:
        return list(shards), False
    order = random.Random(0).sample(range(len(shards)), len(shards))
    fits = sum(total <= MAX_ROWS for total in accumulate(nums[at] for at in order))
    return sorted(shards[at] for at in order[: max(1, min(fits, MAX_SHARDS))]), True


def _read(
    connection: duckdb.DuckDBPyConnection,
    dataset: DatasetDir,
    paths: Sequence[Path],
    shards: Sequence[int] | None,
    lists: WordLists,
) -> None:
    """Creates the table `measured`: for each row its status, country and language, and whether it is of each group.

    The status is the reason why the row was dropped, "download" for all reasons of that stage; NULL for kept rows.
    """
    columns = TableColumns(dataset)
    images = columns.scan(paths, "images")
    columns.save()
    language, bound = language_sql(lists)
    groups = {f"group_{number}": pattern(words) for number, (*_, words) in enumerate(lists.each())}
    of_groups = "".join(f", regexp_matches(words, ${key}) AS {key}" for key in groups)
    decided: dict[str, Any] = {"decisions": str(dataset.decisions)} | ({"shards": list(shards)} if shards else {})
    of_shards = "WHERE shard IN (SELECT unnest($shards))" if shards else ""
    connection.execute(
        "CREATE TEMP TABLE measured AS "  # noqa: S608 - names are from here
        f"SELECT status, {_COUNTRY} AS country, {language} AS language{of_groups} "
        f"FROM (SELECT status, url, caption, {words_sql()} AS words FROM ("
        "SELECT i.url, coalesce(i.caption, '') AS caption, "
        "CASE WHEN i.reason IS NOT NULL THEN 'download' ELSE d.reason END AS status "
        f"FROM ({images.sql}) i JOIN ("
        f"SELECT uid, reason FROM read_parquet($decisions) {of_shards}) d USING (uid)))",
        images.values | bound | groups | decided,
    )


def _filters(database: Path, connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The reasons why downloaded images were dropped, in the order of the funnel if that is at hand."""
    found = connection.execute(
        "SELECT DISTINCT status FROM measured WHERE status IS NOT NULL AND status <> 'download' ORDER BY status"
    )
    statuses = [status for (status,) in found.fetchall()]
    try:
        with duckdb.connect(str(database), read_only=True) as other:
            order = [reason for (reason,) in other.execute("SELECT reason FROM funnel").fetchall()]
    except duckdb.Error:
        order = []
    return sorted(statuses, key=lambda status: (order.index(status) if status in order else len(order), status))


def _at_levels(by_status: Mapping[str | None, int], statuses: Sequence[str]) -> tuple[int, ...]:
    """Numbers left after each of: the selection, the download, each filter."""
    drops = (0, by_status.get("download", 0), *(by_status.get(status, 0) for status in statuses))
    first = sum(by_status.values())
    return tuple(first - gone for gone in accumulate(drops))


def _levels(connection: duckdb.DuckDBPyConnection, statuses: Sequence[str]) -> list[Counts]:
    nums = _at_levels(
        dict(connection.execute("SELECT status, count(*) FROM measured GROUP BY status").fetchall()), statuses
    )
    names = [SELECTED, DOWNLOADED, *(f"after {status}" for status in statuses[:-1]), *([KEPT] if statuses else [])]
    found = [Counts(name=name, nums=(num,)) for name, num in zip(names, nums, strict=True)]
    return found if statuses else [*found, Counts(name=KEPT, nums=nums[-1:])]


def _by_column(connection: duckdb.DuckDBPyConnection, column: str, statuses: Sequence[str]) -> list[Counts]:
    """Counts of each value of a column, the most frequent first."""
    rows = connection.execute(f"SELECT {column}, status, count(*) FROM measured GROUP BY ALL")  # noqa: S608
    found: dict[str, dict[str | None, int]] = {}
    for value, status, num in rows.fetchall():
        found.setdefault(value, {})[status] = num
    counts = [Counts(name=value, nums=_nums(by_status, statuses)) for value, by_status in found.items()]
    return sorted(counts, key=lambda one: (-one.nums[0], one.name))


def _nums(by_status: Mapping[str | None, int], statuses: Sequence[str]) -> tuple[int, ...]:
    nums = _at_levels(by_status, statuses)
    return nums if statuses else (*nums, nums[-1])


def _groups(
    connection: duckdb.DuckDBPyConnection, lists: WordLists, statuses: Sequence[str]
) -> dict[str, list[Counts]]:
    each = list(lists.each())
    sums = "".join(f", count(*) FILTER (group_{number})" for number in range(len(each)))
    rows = connection.execute(f"SELECT status{sums} FROM measured GROUP BY status").fetchall()  # noqa: S608
    found: dict[str, list[Counts]] = {theme: [] for theme in lists.groups}
    for number, (theme, group, _) in enumerate(each, 1):
        found[theme].append(Counts(name=group, nums=_nums({row[0]: row[number] for row in rows}, statuses)))
    return found


def _crossed(connection: duckdb.DuckDBPyConnection, lists: WordLists) -> dict[str, dict[str, int]]:
    """Of the kept captions that speak of each group of the first theme: all, and those of each of the second."""
    if lists.crossed is None:
        return {}
    first, second = (list(_columns_of(lists, theme)) for theme in lists.crossed)
    found = dict[str, dict[str, int]]()
    for name, column in first:
        sums = "".join(f", count(*) FILTER ({other})" for _, other in second)
        row = connection.execute(f"SELECT count(*){sums} FROM measured WHERE status IS NULL AND {column}").fetchone()  # noqa: S608
        found[name] = dict(zip(["captions", *(other for other, _ in second)], row or (), strict=True))
    return found


def _captions(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, shards: Sequence[int], lists: WordLists
) -> list[CaptionFacts]:
    paths = [str(path) for path in map(dataset.captions_table, shards) if path.exists()]
    if not paths:
        return []
    bound = {"captions": paths, "decisions": str(dataset.decisions)}
    kept = "SELECT uid FROM read_parquet($decisions) WHERE reason IS NULL"
    return measure_captions(connection, "FROM read_parquet($captions)", kept, bound, lists)


def _columns_of(lists: WordLists, wanted: str) -> Iterator[tuple[str, str]]:
    for number, (theme, group, _) in enumerate(lists.each()):
        if theme == wanted:
            yield group, f"group_{number}"
