"""What is handled on purpose in the metadata, as sentences for the funnel and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from filters.columns import ALIASES, SCORE_COLUMNS
from filters.recipe import SelectConfig
from filters.rules import RULES, active_rules
from filters.select.schema import MetadataFile

_RELIC = "__index_level_0__"


def notes(files: Sequence[MetadataFile], select: SelectConfig) -> list[str]:
    """Sentences on swapped sizes, other scales, other names, missing columns and missing values.

    What joins and lists did is said by `Joins.notes` and `Lists.notes`.
    """

    def of(num: int) -> str:
        return f"{num} of {len(files)} files"

    said = []
    swapped = sum(file.swapped for file in files)
    if swapped:
        why = "raw LAION release" if select.swapped_sizes == "auto" else "select.swapped_sizes"
        said.append(f"{of(swapped)} have WIDTH and HEIGHT swapped ({why}); turned back")
    v1 = [file.columns["aesthetic_v1"] for file in files if "aesthetic_v1" in file.columns]
    if v1:
        said.append(f"column {v1[0]} of {of(len(v1))} holds V1 scores; used only by min_aesthetic_v1")
    said += _renamed(files, of)
    said += _floats(files, of)
    relics = sum(_RELIC in file.all_columns for file in files)
    if relics:
        said.append(f"{_RELIC} of {of(relics)} ignored")
    usual = set(SCORE_COLUMNS) - {"aesthetic_v1"}  # which few have, and few look for
    for column in (name for name in ALIASES if name in usual):
        num_without = sum(column not in file.columns for file in files)
        if num_without:
            said.append(f"{of(num_without)} have no {column}: NULL there")
    return said + _null_policy(select)


def _renamed(files: Sequence[MetadataFile], of: Callable[[int], str]) -> list[str]:
    """Columns whose name says more than ours does."""
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
