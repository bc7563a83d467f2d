"""LAION's column names, which differ from release to release, under one set of names."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from filters.rules import RULES
from sdtrain.errors import UserError

# Our name -> the names it has in LAION's releases, COYO and DataComp, compared without regard to case.
ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url",),
    "caption": ("text", "caption"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity",),
    "hash": ("hash",),
    "pwatermark": ("pwatermark",),
    "punsafe": ("punsafe",),
    "aesthetic": ("aesthetic_score", "aesthetic_score_laion_v2"),
}
TYPES: dict[str, str] = {
    **dict.fromkeys(("url", "caption"), "VARCHAR"),
    **dict.fromkeys(("width", "height"), "INTEGER"),
    "hash": "BIGINT",
    **dict.fromkeys(("similarity", "pwatermark", "punsafe", "aesthetic"), "DOUBLE"),
}
SCORES = ("similarity", "pwatermark", "punsafe", "aesthetic")
_DERIVED = {"side": ("width", "height"), "aspect_ratio": ("width", "height"), "caption_chars": ("caption",)}
_V1_SCORE = "aesthetic"  # lower case and without _SCORE: the scores of laion2B-en-aesthetic, on another scale


@dataclass(frozen=True)
class MetadataFile:
    """One input file.

    Attributes:
        columns: our name -> its name in this file, for the columns that it has.
        types: the types of those columns, in the same order.
        num_rows: from the footer.
        footer_sha256: digest of the Parquet footer, which holds schema, offsets and statistics.
    """

    path: Path
    columns: dict[str, str]
    types: tuple[str, ...]
    all_columns: tuple[str, ...]
    num_rows: int
    footer_sha256: str

    @property
    def identity(self) -> tuple[str, int, str]:
        """What tells whether the file is still the same, wherever it lies."""
        return self.path.name, self.path.stat().st_size, self.footer_sha256


def find_metadata(pattern: str) -> list[MetadataFile]:
    """The Parquet files that a recipe's `select.metadata` means: a file, a folder (with subfolders) or a glob.

    Raises:
        UserError: nothing matches, a file is not Parquet, or there are no rows.
    """
    if not pattern:
        raise UserError("The recipe names no metadata. Give Parquet files with LAION's columns: --metadata PATH.")
    if "://" in pattern:
        raise UserError(
            f"Metadata must lie on a local or mounted disk, and {pattern} does not. Copy the Parquet files here first."
        )
    path = Path(pattern).expanduser()
    paths = _matching(path)
    if not paths:
        kind = "no .parquet file in the folder" if path.is_dir() else "no file or folder"
        raise UserError(f"There is {kind} {pattern}, which the recipe names as metadata. Check --metadata.")
    files = [_read_footer(p) for p in sorted(paths)]
    if not sum(file.num_rows for file in files):
        raise UserError(f"The metadata in {pattern} has no rows ({len(files)} Parquet file(s), all empty).")
    return files


def _matching(path: Path) -> list[Path]:
    if path.is_dir():
        return [p for p in path.rglob("*.parquet") if not p.name.startswith((".", "_"))]
    if path.is_file():
        return [path]
    # Not Path.glob, which refuses absolute patterns.
    return [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]  # noqa: PTH207


def check_columns(files: Iterable[MetadataFile], rules: Iterable[str], missing_passes: Iterable[str] = ()) -> None:
    """Refuses files without a column that is needed: url, caption and whatever the rules look at.

    Args:
        files: the input.
        rules: names of the recipe's rules.
        missing_passes: our names of columns that may be missing even though a rule looks at them.

    Raises:
        UserError: names file, column and rule, and the columns that the file has.
    """
    needed = {"url": "", "caption": ""}
    for rule in rules:
        column = RULES[rule].column
        for source in _DERIVED.get(column, (column,)):
            needed.setdefault(source, f", which rule '{rule}' needs")
    optional = set(missing_passes)
    for file in files:
        for column, purpose in needed.items():
            if column not in file.columns:
                _refuse_v1(file, column, purpose)
                if column not in optional:
                    raise UserError(_missing(file, column, purpose))


def _missing(file: MetadataFile, column: str, purpose: str) -> str:
    names = " or ".join(name.upper() for name in ALIASES[column])
    advice = ""
    if column in ("width", "height"):
        advice = " Or move the rule from `select` to `keep`, where it looks at the downloaded picture."
    elif column in SCORES:
        advice = " Or set `select.null_policy: score_later` and let the picture's own score decide."
    return (
        f"{file.path} has no column {names}{purpose}. It has: {', '.join(file.all_columns)}. "
        f"Use metadata with that column.{advice}"
    )


def _refuse_v1(file: MetadataFile, column: str, purpose: str) -> None:
    if column == "aesthetic" and _V1_SCORE in (name.lower() for name in file.all_columns):
        raise UserError(
            f"{file.path} has the aesthetic scores of LAION's first predictor (column '{_V1_SCORE}'), not the V2 "
            f"scores (AESTHETIC_SCORE){purpose}. The two scales differ and are never mixed: use metadata with "
            "AESTHETIC_SCORE, or leave the rule out of `select`."
        )


def _read_footer(path: Path) -> MetadataFile:
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    by_lower: dict[str, str] = {}
    for name in schema.names:
        if name.lower() in by_lower:
            raise UserError(f"{path} has two columns that differ in case only: {by_lower[name.lower()]} and {name}.")
        by_lower[name.lower()] = name
    columns = {}
    for ours, aliases in ALIASES.items():
        found = [by_lower[alias] for alias in aliases if alias in by_lower]
        if found:
            columns[ours] = found[0]
    types = tuple(str(schema.field(name).type) for name in columns.values())
    return MetadataFile(path, columns, types, tuple(schema.names), metadata.num_rows, _footer_digest(path))


def _footer_digest(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()
