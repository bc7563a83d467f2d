"""Columns that a recipe names: mapped to ours (`select.columns`), or carried (`select.carry`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import duckdb

from filters.select.carried import common_kind, kind_of, kinds_of_text
from filters.select.schema import MetadataFile, normalised_sql
from filters.select.text_files import NESTED
from sdtrain.errors import UserError
from sdtrain.settings import nearest

OWN_UID = "uid of the metadata"
"""A column that lists by uid look at, besides sdtrain's own uid."""


def map_columns(files: Sequence[MetadataFile], columns: Mapping[str, str]) -> list[MetadataFile]:
    """Reads our columns (keys) from the files' columns that a recipe's `select.columns` names, in either case.

    A file without that column keeps what it has under one of the usual names. UserError if no file has it.
    """
    for ours, name in columns.items():
        if not any(_named_in(file, name) for file in files):
            listed = ", ".join(files[0].all_columns)
            raise UserError(f"select.columns: {ours}: {name}: {files[0].path} has no column {name}. It has: {listed}.")
    return [_mapped(file, columns) for file in files]


def _named_in(file: MetadataFile, name: str) -> str | None:
    """Returns a column's name as the file spells it."""
    exact = [found for found in file.all_columns if found == name]
    return next(iter(exact or [found for found in file.all_columns if found.strip().lower() == name.lower()]), None)


def _mapped(file: MetadataFile, columns: Mapping[str, str]) -> MetadataFile:
    found = {ours: name for ours, wanted in columns.items() if (name := _named_in(file, wanted))}
    if not found:
        return file
    names = file.columns | found
    return replace(file, columns=names, types={ours: file.file_types[name] for ours, name in names.items()})


def find_carried(files: Sequence[MetadataFile], carry: Sequence[str]) -> list[MetadataFile]:
    """Finds the columns of a recipe's `select.carry`, in either case; raises `UserError` if no file has one."""
    for name in carry:
        spelled = [(file, found) for file in files if (found := _named_in(file, name))]
        if not spelled:
            raise UserError(
                f"select.carry: {files[0].path} has no column {name}.{nearest(name, list(files[0].all_columns))} "
                f"It has: {', '.join(files[0].all_columns)}."
            )
        nested = next((file for file, found in spelled if file.file_types[found] == NESTED), None)
        if nested:
            raise UserError(
                f"select.carry: column {name} of {nested.path} holds lists or objects, and a table's column one value. "
                "Write what you need of it into a column of its own."
            )
    found_in = ({name: found for name in carry if (found := _named_in(file, name))} for file in files)
    return [replace(file, carried=found) for file, found in zip(files, found_in, strict=True)]


def find_own_uids(files: Sequence[MetadataFile]) -> list[MetadataFile]:
    """Finds the metadata's own column `uid`, as DataComp has it; where there is one, it is carried as `OWN_UID`."""
    found = [_named_in(file, "uid") for file in files]
    return [
        replace(file, carried=file.carried | {OWN_UID: name}) if name else file
        for file, name in zip(files, found, strict=True)
    ]


def carried_kinds(
    connection: duckdb.DuckDBPyConnection, files: Sequence[MetadataFile], carry: Sequence[str]
) -> dict[str, str]:
    """Returns the types of the columns of `select.carry` in our tables; reads text whole, to know them."""
    texts = [file for file in files if file.form and file.carried]
    kinds: dict[str, list[str | None]] = {name: [] for name in carry}
    if texts:
        rows, values = normalised_sql(texts, carried=dict.fromkeys(carry, "VARCHAR"))
        for name, kind in kinds_of_text(connection, rows, values, carry).items():
            kinds[name].append(kind)
    for file in files:
        for name, found in ((name, file.carried[name]) for name in carry if name in file.carried):
            kinds[name] += [] if file.form else [kind_of(file.file_types[found])]
    return {name: common_kind(found) for name, found in kinds.items()}
