"""Imports a user's own images: lists the source, then runs the selection and the stage that makes images of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filters.preflight import sized_checks
from filters.recipe import Recipe, load_recipe
from filters.recipe_record import of_source, output_dataset, read_recipe, record_recipe
from filters.select.stage import SELECT
from sdtrain.dataset.config import SourceConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.stage import Stage
from sdtrain.dataset.sync import fetch_if_stored
from sdtrain.download.source.update import Update, update_catalogues
from sdtrain.download.stage import DOWNLOAD
from sdtrain.errors import UserError
from sdtrain.preflight.checks import require
from sdtrain.settings import parse_settings

DEFAULT_RECIPE = "own-images"
STAGES: tuple[Stage[Recipe], ...] = (SELECT, DOWNLOAD)
"""Those that an import runs; `sdtrain build` goes on from there."""


@dataclass(frozen=True)
class ImportOptions:
    """What to import, and into which dataset; None keeps what the dataset's recipe says, or the default.

    Attributes:
        source: a folder, tar or Parquet file.
        output: the dataset: its directory, or s3://…
        recipe: name or YAML file.
        settings: changes of `SourceConfig`: name, columns, encoding, follow_links.
        require_caption: drop images without a caption, as the rule `min_caption_chars`.
        samples_per_shard: of images and of packed samples.
        work_dir: for an output on s3://.
    """

    source: Path
    output: str
    recipe: str | None = None
    settings: dict[str, Any] | None = None
    require_caption: bool = False
    samples_per_shard: int | None = None
    work_dir: str | None = None


@dataclass(frozen=True)
class Import:
    """An import in progress, with its dataset locked; `update` says what is new in the source."""

    dataset: DatasetDir
    recipe: Recipe
    update: Update
    changes: str

    def check_room(self, stage: str, num_pending: int, num_shards: int) -> None:
        """Raises `UserError` before the first image if the disk surely is too small; for `run_with_bar`."""
        if stage == DOWNLOAD.name:
            num_rows = sum(entry.num_out for entry in entries(self.dataset, SELECT.name))
            require(sized_checks(self.dataset, self.recipe, num_rows, [DOWNLOAD], num_pending / max(num_shards, 1)))


@contextmanager
def open_import(options: ImportOptions, on_progress: Callable[[int], None] = lambda number: None) -> Iterator[Import]:
    """Locks the dataset, lists what is new in the source, and writes the views at the end unless the import fails.

    `on_progress` is told the number of listed images from time to time. UserError if the source cannot be imported, or
    not into this dataset.
    """
    from filters.inspect.views import write_views
    from filters.remove.apply import finish_interrupted_removal

    path = _checked_source(options)
    named = load_recipe(options.recipe or DEFAULT_RECIPE)
    dataset = output_dataset(options.output, named, options.work_dir)
    with lock_to_change(dataset, "sdtrain import"):
        finish_interrupted_removal(dataset)
        recipe = _recipe(dataset, options, named, path)
        if recipe.source is None:
            raise AssertionError("`_recipe` sets it")
        for number in range(len(entries(dataset, SELECT.name)) + 1):
            fetch_if_stored(dataset, dataset.catalogue(number))
        update = update_catalogues(dataset, recipe.source, on_progress)
        changes = "; ".join(record_recipe(dataset, recipe))
        yield Import(dataset, recipe, update, changes)
        write_views(dataset, recipe)


def _checked_source(options: ImportOptions) -> Path:
    if "://" in str(options.source) or re.match(r"[a-z0-9]+:/", str(options.source)):
        raise UserError(f"{options.source} is a URL, and a source lies on this machine. Copy it here first.")
    path = options.source.expanduser().absolute()
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if path.is_file() and path.suffix.lower() not in (".tar", ".parquet"):
        raise UserError(f"{path} is neither a tar nor a Parquet file. Give the folder that holds your images.")
    output = Path(options.output).expanduser().absolute()
    if "://" not in options.output and output.resolve().is_relative_to(path.resolve()):
        raise UserError(f"The output {output} lies in the source {path}, and would be imported too. Choose another.")
    return path


def _recipe(dataset: DatasetDir, options: ImportOptions, named: Recipe, path: Path) -> Recipe:
    """The recipe of the dataset as it was imported before, or as named, with the options' changes."""
    recorded = read_recipe(dataset) if dataset.recipe.exists() else None
    if recorded and recorded.source is None:
        raise UserError(
            f"{dataset} was built from metadata, and images cannot be added to it. Choose another --output, and "
            "train on both (`data.sources`)."
        )
    recipe = recorded if recorded and options.recipe is None else named
    before = (recorded and recorded.source) or recipe.source
    content = (
        (before.model_dump() if before else {"name": _name_of(path)}) | {"path": str(path)} | (options.settings or {})
    )
    source = parse_settings(SourceConfig, content, "the source")
    return of_source(dataset, _changed(recipe, options), source)


def _changed(recipe: Recipe, options: ImportOptions) -> Recipe:
    select, pack = recipe.select, recipe.pack
    if options.require_caption and not recipe.select.rules.get("min_caption_chars"):
        select = select.model_copy(update={"rules": {**select.rules, "min_caption_chars": 1.0}})
    if options.samples_per_shard:
        select = select.model_copy(update={"samples_per_shard": options.samples_per_shard})
        pack = pack.model_copy(update={"samples_per_shard": options.samples_per_shard})
    return recipe.model_copy(update={"select": select, "pack": pack})


def _name_of(path: Path) -> str:
    """A name for URLs of lower-case letters, digits, dots and hyphens, as hosts have."""
    stem = path.stem if path.is_file() else path.resolve().name
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "images"
