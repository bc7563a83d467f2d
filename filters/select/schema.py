"""LAION's column names, which differ between releases, mapped to one set of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb

from filters.columns import ALIASES, SCORE_COLUMNS, TYPES, SwappedSizes
from filters.rules import RULES, sources_of
from filters.select.carried import carried_sql
from filters.select.pushdown import Pushdown, pushdown_sql
from filters.select.sql_functions import hash_sql, laion_hash
from filters.select.text_files import NESTED, TextFormat, text_sql
from sdtrain.errors import UserError

# Rows per file whose `hash` is verified.
_HASHES_CHECKED = 1000
_HASHES_PER_FILE = 10
_DIGEST_CHARS = {"md5": 32, "sha256": 64}
_FLOATS = ("FLOAT", "DOUBLE")
# Parts of names that tell of a column, the surest first.
_LIKELY = {
    "url": ("url", "uri", "link", "href", "src"),
    "caption": ("caption", "text", "alt", "prompt", "description", "title", "sentence"),
    "width": ("width",),
    "height": ("height",),
}
# Only LAION's first releases have both columns; there WIDTH holds heights and HEIGHT widths.
_RAW_RELEASE = {"sample_id", "license"}


@dataclass(frozen=True)
class MetadataFile:
    """One input file.

    Attributes:
        path: absolute, or a URL.
        columns: our name -> the file's, for columns present.
        types: our name -> the file's DuckDB type.
        file_types: the file's name -> its DuckDB type, for all columns; "NESTED" for lists and structs.
        num_rows: None for text, whose rows are known once it is read.
        identity: name, size and a digest (of the footer of Parquet), which identify the file wherever it is stored.
        swapped: whether `columns` already exchanges WIDTH and HEIGHT.
        form: of a text file; None for Parquet.
        carried: a column of `select.carry` -> the file's, for columns present.
    """

    path: str
    columns: dict[str, str]
    types: dict[str, str]
    file_types: dict[str, str]
    num_rows: int | None
    identity: tuple[str, int, str]
    swapped: bool = False
    form: TextFormat | None = None
    carried: dict[str, str] = field(default_factory=dict)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The names of all columns."""
        return tuple(self.file_types)

    @property
    def has_row_numbers(self) -> bool:
        """Whether DuckDB can number the rows, to read some of them."""
        return self.form is None and "file_row_number" not in map(str.lower, self.file_types)


def describe_file(
    path: str, types: Mapping[str, str], num_rows: int | None, identity: tuple[str, int, str]
) -> MetadataFile:
    """Describes a file by its column names and types; raises `UserError` if two names differ only in case."""
    by_lower: dict[str, str] = {}
    for name in types:
        if name.lower() in by_lower:
            raise UserError(f"{path} has two columns that differ in case only: {by_lower[name.lower()]} and {name}.")
        by_lower[name.lower()] = name
    columns = {}
    for ours, aliases in _aliases_in(by_lower).items():
        found = [by_lower[alias] for alias in aliases if alias in by_lower]
        if found:
            columns[ours] = found[0]
    ours_types = {ours: types[name] for ours, name in columns.items()}
    return MetadataFile(path, columns, ours_types, dict(types), num_rows, identity)


def _aliases_in(by_lower: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    # Our own selections have both, and call the V2 score `aesthetic`.
    return ALIASES | ({"aesthetic": ("aesthetic",)} if "aesthetic_v1" in by_lower else {})


def turn_sizes(files: Iterable[MetadataFile], swapped_sizes: SwappedSizes) -> list[MetadataFile]:
    """Exchanges WIDTH and HEIGHT where they are swapped; "auto" means in raw LAION releases."""
    return [_turned(file) if _is_swapped(file, swapped_sizes) else file for file in files]


def _is_swapped(file: MetadataFile, swapped_sizes: SwappedSizes) -> bool:
    if swapped_sizes != "auto" or not {"width", "height"} <= set(file.columns):
        return swapped_sizes == "yes"
    # Sizes that img2dataset measured (original_width) are always right.
    return set(map(str.lower, file.all_columns)) >= _RAW_RELEASE and file.columns["width"].lower() == "width"


def _turned(file: MetadataFile) -> MetadataFile:
    other = {"width": "height", "height": "width"}
    columns = {other.get(ours, ours): name for ours, name in file.columns.items()}
    types = {other.get(ours, ours): kind for ours, kind in file.types.items()}
    return replace(file, columns=columns, types=types, swapped=True)


def check_columns(files: Iterable[MetadataFile], rules: Iterable[str], missing_passes: Iterable[str] = ()) -> None:
    """Raises `UserError` if a file lacks url, caption or a column of `rules`, unless listed in `missing_passes`."""
    needed = {"url": "", "caption": ""}
    for rule in rules:
        if rule not in RULES:
            continue  # of a carried column, which `find_carried` has found
        column = RULES[rule].column
        for source in sources_of(column):
            needed.setdefault(source, f", which rule '{rule}' needs")
    required = {column: purpose for column, purpose in needed.items() if column not in set(missing_passes)}
    for file in files:
        for column, purpose in required.items():
            if column not in file.columns:
                _refuse_v1(file, column, purpose)
                raise UserError(_missing(file, column, purpose))
            if file.types[column] == NESTED:
                raise UserError(
                    f"{file.path}: column {file.columns[column]} holds lists or objects, and {column} is one value. "
                    f"Write it into a column of its own, or name another: select.columns: {{{column}: NAME}}."
                )


def _missing(file: MetadataFile, column: str, purpose: str) -> str:
    names = " or ".join(name.upper() for name in ALIASES[column])
    advice = ""
    if column in ("width", "height"):
        advice = " Or move the rule from `select` to `decide`, where it looks at the downloaded image."
    elif column in SCORE_COLUMNS:
        advice = " Or set `select.null_policy: score_later` and let the image's own score decide."
    return (
        f"{file.path} has no column {names}{purpose}. It has: {', '.join(file.all_columns)}. "
        f"{_suggestion(file, column) or 'Use metadata with that column.'}{advice}"
    )


def _suggestion(file: MetadataFile, missing: str) -> str:
    """Returns the setting that would name the missing columns, if some of the file's look like them."""
    wanted = [missing, *(ours for ours in ("url", "caption") if ours != missing and ours not in file.columns)]
    taken, likely = set(file.columns.values()), dict[str, str]()
    for ours in wanted:
        name = next((name for name in _by_likeness(file, ours) if name not in taken), None)
        if name:
            likely[ours] = name
            taken.add(name)
    if missing not in likely:
        return ""
    ordered = ", ".join(f"{ours}: {likely[ours]}" for ours in ALIASES if ours in likely)
    return f"If these are meant, name them in the recipe: select.columns: {{{ordered}}}."


def _by_likeness(file: MetadataFile, ours: str) -> list[str]:
    words = _LIKELY.get(ours, (ours,))
    flat = [name for name in file.all_columns if file.file_types[name] != NESTED]
    return [name for word in words for name in flat if word in name.lower()]


def _refuse_v1(file: MetadataFile, column: str, purpose: str) -> None:
    if column == "aesthetic" and "aesthetic_v1" in file.columns:
        raise UserError(
            f"{file.path} has the aesthetic scores of LAION's first predictor (column "
            f"'{file.columns['aesthetic_v1']}'), not the V2 scores (AESTHETIC_SCORE){purpose}. The two scales differ "
            "and are never mixed: use metadata with AESTHETIC_SCORE, or rule 'min_aesthetic_v1'."
        )


def normalised_sql(
    files: Sequence[MetadataFile],
    pushdown: Pushdown | None = None,
    compute_hash: bool = False,
    rows: tuple[int, int] | None = None,
    carried: Mapping[str, str] | None = None,
) -> tuple[str, list[Any]]:
    """Returns SQL for the rows of all files under our column names and types, and the values to bind.

    Files with one schema are read together; absent columns are NULL.

    Args:
        files: the input.
        pushdown: rules to push down, see `pushdown_sql`; the rows must still be checked.
        compute_hash: fill missing `hash` with `laion_hash`, to be registered by `sql_functions.register_laion_hash`;
            free for queries that do not select `hash`.
        rows: half-open range of row numbers to read from each file.
        carried: columns of `select.carry` to add, with their types.
    """
    groups: dict[object, list[MetadataFile]] = {}
    for file in files:
        # The columns of text must be named in order to read it.
        names = file.all_columns if file.form else ()
        own = [(name, found, file.file_types[found]) for name, found in file.carried.items()]
        key = (*file.columns.items(), *file.types.items(), file.form, names, file.has_row_numbers, *own)
        groups.setdefault(key, []).append(file)
    parts, values = [], list[Any]()
    for group in groups.values():
        part, bound = _part_sql(group, pushdown, compute_hash, rows, carried or {})
        parts.append(part)
        values += bound
    return " UNION ALL ".join(parts), values


def _part_sql(
    group: Sequence[MetadataFile],
    pushdown: Pushdown | None,
    compute_hash: bool,
    rows: tuple[int, int] | None,
    carried: Mapping[str, str],
) -> tuple[str, list[Any]]:
    names = {ours: quoted(name) for ours, name in group[0].columns.items()}
    items = {ours: column_sql(ours, names.get(ours), group[0].types.get(ours, "")) for ours in ALIASES}
    if compute_hash and "hash" not in names:
        items["hash"] = hash_sql(items["url"], items["caption"])
    items |= {quoted(name): _carried_item(group[0], name, kind) for name, kind in carried.items()}
    select = ", ".join(f"{sql} AS {ours}" for ours, sql in items.items())
    part = f"SELECT {select} FROM {_source_sql(group[0], numbered=rows is not None)}"  # noqa: S608 - names are quoted
    values: list[Any] = [[file.path for file in group]]
    conditions = []
    if rows:
        conditions.append("file_row_number >= ? AND file_row_number < ?")
        values += rows
    if pushdown:
        condition, bound = pushdown_sql(pushdown, names, group[0].types)
        conditions.append(condition)
        values += bound
    return (f"{part} WHERE {' AND '.join(conditions)}" if conditions else part), values


def _carried_item(file: MetadataFile, name: str, kind: str) -> str:
    found = file.carried.get(name)
    return f"NULL::{kind}" if found is None else carried_sql(quoted(found), file.file_types[found], kind)


def _source_sql(file: MetadataFile, numbered: bool) -> str:
    if file.form:
        return text_sql(file.form, file.all_columns, [*file.columns.values(), *file.carried.values()])
    return f"read_parquet(?, hive_partitioning = false{', file_row_number = true' if numbered else ''})"


def column_sql(ours: str, name: str | None, kind: str) -> str:
    """Returns SQL for one of our columns; a plain column where type and meaning already agree."""
    wanted = TYPES[ours]
    if name is None:
        return f"NULL::{wanted}"
    if ours in _DIGEST_CHARS:
        text, pattern = f"lower({name}::VARCHAR)", f"[0-9a-f]{{{_DIGEST_CHARS[ours]}}}"
        return f"CASE WHEN regexp_full_match({text}, '{pattern}') THEN {text} END"
    if wanted == "DOUBLE":
        value = name if kind in _FLOATS else f"TRY_CAST({name} AS DOUBLE)"
        # pandas writes missing scores as NaN and infinity.
        return f"CASE WHEN isfinite({value}) THEN {value}::DOUBLE END"
    if kind == wanted:
        return name
    if wanted == "VARCHAR" and kind == "BLOB":
        return f"TRY(decode({name}))"
    if wanted == "INTEGER" and kind not in ("TINYINT", "SMALLINT", "BIGINT"):
        # Sizes that pandas made floats hold NaN, which no integer can: NULL. A cast alone would round up.
        return f"TRY_CAST(trunc(TRY_CAST({name} AS DOUBLE)) AS INTEGER)"
    return f"TRY_CAST({name} AS {wanted})"


def quoted(name: str) -> str:
    """Quotes a column name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def check_hashes(connection: duckdb.DuckDBPyConnection, files: Sequence[MetadataFile]) -> int:
    """Checks `hash` against URL and TEXT on some rows per file; returns how many; raises `UserError` if one differs."""
    checked = [file for file in files if {"hash", "url", "caption"} <= set(file.columns)]
    per_file = max(_HASHES_PER_FILE, _HASHES_CHECKED // max(1, len(checked)))
    return sum(_check_file(connection, file, per_file) for file in checked)


def _check_file(connection: duckdb.DuckDBPyConnection, file: MetadataFile, num_rows: int) -> int:
    rows, values = normalised_sql([file])
    sample = f"SELECT url, caption, hash FROM ({rows}) LIMIT {num_rows}"  # noqa: S608 - built from ALIASES
    compared = 0
    for url, caption, found in connection.execute(sample, values).fetchall():
        if found is None and file.types["hash"].endswith("INT"):
            continue  # other types may hold text that is not a number
        compared += 1
        if found != laion_hash(url, caption):
            raise UserError(
                f"Column '{file.columns['hash']}' of {file.path} is not the hash of URL and TEXT: for "
                f"{url} it holds {found}, not {laion_hash(url, caption)}. Go by url_caption "
                "instead of hash."
            )
    return compared
