"""Opens the metadata, score files and lists of a selection, before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from filters.columns import SCORE_COLUMNS
from filters.recipe import Recipe
from filters.select.lists import list_files
from filters.select.metadata_files import metadata_of, num_rows_of
from filters.select.schema import check_columns
from filters.select.score_joins import columns_of, join_files
from sdtrain.dataset.stage import Openers
from sdtrain.settings import Settings


def open_files(recipe: Recipe) -> Openers:
    """Returns an opener for the metadata and each join and list, by its setting."""
    select, openers = recipe.select, Openers({"select.metadata": partial(_check_metadata, recipe)})
    openers |= {f"select.joins.{n}": partial(_num_files, join_files, join) for n, join in enumerate(select.joins)}
    for name, lists in (("blocklists", select.blocklists), ("allowlists", select.allowlists)):
        openers |= {f"select.{name}.{n}": partial(_num_files, list_files, entry) for n, entry in enumerate(lists)}
    return openers


def _num_files(find: Callable[[Any], Sequence[object]], config: Settings) -> str:
    return f"{len(find(config))} files"


def _check_metadata(recipe: Recipe) -> str:
    select = recipe.select
    files = metadata_of(select)
    may_miss = [column for join in select.joins for column in columns_of(join, join_files(join))]
    check_columns(files, select.rules, [*may_miss, *(SCORE_COLUMNS if select.null_policy == "score_later" else ())])
    num_rows = num_rows_of(files)
    return f"{len(files)} files" + ("" if num_rows is None else f", {num_rows:,} rows")
