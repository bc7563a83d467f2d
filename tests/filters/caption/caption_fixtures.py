"""A small dataset built from its metadata to its latents, whose duplicates have told what they were called."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from filters.recipe import Recipe
from sdtrain.dataset.layout import DatasetDir
from tests.filters.removal_fixtures import build, make_recipe, write_metadata

CAPTIONED = {"caption": {"from_duplicates": True}}
NUMBERS = [0, 1, 2, 4, 5, 6, 8, 20, 21, 22]
"""Of the photos of `removal_fixtures`: 20 and 21 are the bytes of 4 and 5, and 22 looks like 6."""


def build_captioned(folder: Path, port: int, **changed: Any) -> tuple[DatasetDir, Recipe]:
    """A finished dataset and its recipe."""
    recipe = make_recipe(write_metadata(folder / "metadata" / "a.parquet", port, NUMBERS), **CAPTIONED | changed)
    dataset = DatasetDir(folder / "data")
    build(dataset, recipe)
    return dataset, recipe


def packed_json(dataset: DatasetDir, stage: str = "dataset") -> dict[str, dict[str, Any]]:
    """What the JSON in the tars of `dataset` or `latents` says, by uid."""
    found = {}
    for path in sorted((dataset.root / stage).glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    sample = json.loads(tar.extractfile(info).read())
                    found[sample["uid"]] = sample
    return found


def latents_rows(dataset: DatasetDir) -> dict[str, dict[str, Any]]:
    """The rows of the latents' tables, by uid."""
    tables = sorted((dataset.root / "latents").glob("[0-9]*.parquet"))
    return {row["uid"]: row for table in tables for row in pq.read_table(table).to_pylist()}
