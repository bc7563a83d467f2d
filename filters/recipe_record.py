"""The recipe that a dataset was built with, stored beside the data."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

from filters.columns import SCORE_COLUMNS
from filters.recipe import Recipe
from filters.rules import RULES, active_rules
from filters.select_config import SelectConfig
from sdtrain.dataset.config import SourceConfig
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3.url import is_s3
from sdtrain.dataset.sync import fetch_if_stored, push_files
from sdtrain.errors import UserError
from sdtrain.precision import Fixed, Precision, choose, default_device, warning_if_slow
from sdtrain.redaction import as_recorded
from sdtrain.settings import dump_settings, load_settings

_log = logging.getLogger(__name__)


def record_recipe(dataset: DatasetDir, recipe: Recipe) -> list[str]:
    """Writes `recipe` into the dataset; returns its differences from the previous run's.

    Work that the differences affect is redone, because its fingerprint no longer matches. UserError if no metadata was
    named, or the directory cannot be written.
    """
    require_metadata(recipe)
    try:
        before = read_recipe(dataset) if dataset.recipe.exists() else recipe
        with publish(dataset.recipe) as temporary:
            temporary.write_text(dump_settings(recipe))
        push_files(dataset, dataset.recipe)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{dataset.root} cannot be written ({error.strerror}). Choose another --output.") from error
    return differences(before, recipe)


def with_precision(dataset: DatasetDir, recipe: Recipe) -> Recipe:
    """Resolves each `auto` once per dataset, so that a build continued on another machine writes the same bytes."""
    model = recipe.caption.model
    if "auto" not in (recipe.score.dtype, recipe.encode.precision, model and model.precision):
        return recipe
    kept = read_recipe(dataset) if dataset.recipe.exists() else recipe
    score, encode, caption = recipe.score, recipe.encode, recipe.caption
    if score.dtype == "auto":
        begun = _begun_in("score.dtype", "fp32" if kept.score.dtype == "float32" else kept.score.dtype)
        score = score.model_copy(update={"dtype": "float32" if begun == "fp32" else begun})
    if encode.precision == "auto":
        encode = encode.model_copy(update={"precision": _begun_in("encode.precision", kept.encode.precision)})
    if model and model.precision == "auto":
        before = kept.caption.model.precision if kept.caption.model else "auto"
        model = model.model_copy(update={"precision": _begun_in("caption.model.precision", before)})
        caption = caption.model_copy(update={"model": model})
    return recipe.model_copy(update={"score": score, "encode": encode, "caption": caption})


def _begun_in(setting: str, kept: Precision) -> Fixed:
    if kept == "auto":
        choice = choose(default_device())
        _log.info("%s: %s (auto; %s)", setting, choice.precision, choice.reason)
        return choice.precision
    if kept != "fp32" and (warning := warning_if_slow(kept, default_device())):  # would import torch
        _log.warning("%s stays as the dataset was begun: %s", setting, warning)
    return kept


def with_source(dataset: DatasetDir, recipe: Recipe) -> Recipe:
    """Returns the recipe for the user's own images, if the dataset was imported (`sdtrain import`); else as it is.

    UserError if it names metadata or another source, or names a source that was not imported here.
    """
    recorded = read_recipe(dataset).source if dataset.recipe.exists() else None
    if recorded is None and recipe.source is None:
        return recipe
    if recorded is None:
        raise UserError(
            f"Recipe '{recipe.name}' is for images of {recipe.source and recipe.source.path}, and {dataset} does not "
            "hold them yet. Import them first: sdtrain import SOURCE --output DATASET --recipe RECIPE."
        )
    if recipe.source is None and recipe.select.metadata:
        raise UserError(
            f"{dataset} holds images of {recorded.path}, and no metadata can be added to them. Choose another "
            "--output, and train on both (`data.sources`)."
        )
    _fetch_catalogues(dataset)
    return of_source(dataset, recipe, recorded)


def of_source(dataset: DatasetDir, recipe: Recipe, source: SourceConfig) -> Recipe:
    """Returns the recipe for what was imported from `source`: its metadata is the dataset's own list.

    UserError if rules look at columns of the metadata, of which images from a disk have only captions.
    """
    _check_select_rules(recipe.select)
    scored = [name for name in active_rules(recipe.decide.rules) if RULES[name].column in SCORE_COLUMNS]
    if scored and recipe.decide.decide_by == "metadata":
        raise UserError(
            f"Imported images have no scores but those of our own networks, and rule '{scored[0]}' of `decide` looks "
            "at the metadata's. Set `decide_by: image` in `decide`."
        )
    select = recipe.select.model_copy(update={"metadata": str(dataset.catalogues.absolute())})
    return recipe.model_copy(update={"source": source, "select": select})


def _check_select_rules(select: SelectConfig) -> None:
    later = SCORE_COLUMNS if select.null_policy == "score_later" else ()
    for name in active_rules(select.rules):
        lacking = set(RULES[name].sources) - {"url", "caption", *later}
        if lacking and not select.joins:
            advice = "Move it to `decide`, with `decide_by: image`." if RULES[name].in_decide else "Leave it out."
            raise UserError(
                f"Rule '{name}' of `select` looks at {' and '.join(sorted(lacking))}, which nobody has stated for "
                f"imported images. {advice}"
            )


def _fetch_catalogues(dataset: DatasetDir) -> None:
    """Fetches from S3 the lists of what was imported, which are numbered from 0."""
    for number in itertools.count():
        fetch_if_stored(dataset, dataset.catalogue(number))
        if not dataset.catalogue(number).exists():
            return


def require_metadata(recipe: Recipe) -> None:
    """Raises `UserError` if a recipe names no metadata; builds call it before they create a folder."""
    if not recipe.select.metadata:
        raise UserError(
            f"Recipe '{recipe.name}' names no metadata. Give Parquet files with LAION's columns: --metadata FILE, "
            "FOLDER or GLOB (in Prefect: -p metadata=...). Your own images: sdtrain import SOURCE --output DATASET."
        )


def read_recipe(dataset: DatasetDir) -> Recipe:
    """Returns the recipe of the dataset's last build; raises `UserError` if it is missing or damaged."""
    if not dataset.recipe.exists():
        raise UserError(f"{dataset} holds no dataset (no recipe.yaml). Build one with `sdtrain build`.")
    recipe = load_settings(Recipe, dataset.recipe)
    if recipe.source is None:
        return recipe
    here = {"metadata": str(dataset.catalogues.absolute())}  # also after the dataset was moved
    return recipe.model_copy(update={"select": recipe.select.model_copy(update=here)})


def dataset_path(output: str, recipe: Recipe) -> Path:
    """Returns the directory for `output`, expanding `{recipe}` to the recipe's name; raises `UserError` for a URL."""
    if "://" in output:
        raise UserError(f"Nothing can be written to {output}: an output is a directory, or s3://BUCKET/PREFIX.")
    return Path(output.replace("{recipe}", recipe.name)).expanduser().absolute()


def output_dataset(output: str, recipe: Recipe, work_dir: str | None = None) -> DatasetDir:
    """Returns the dataset at `output`, a directory or s3://…, expanding `{recipe}` to the recipe's name.

    `work_dir` is the parent of work folders for S3 datasets; raises `UserError` if given for a directory.
    """
    if work_dir and not is_s3(output):
        raise UserError(f"{output} lies on this machine and has no work folder. Leave out --work-dir.")
    if is_s3(output):
        return dataset_at(output.replace("{recipe}", recipe.name), Path(work_dir) if work_dir else None)
    return DatasetDir(dataset_path(output, recipe))


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Returns changed settings, like "select.limit: 100 -> 200"; names and descriptions aside."""
    old, new = (_flat(as_recorded(recipe.model_dump(mode="json"))) for recipe in (before, after))
    names = [n for n in dict.fromkeys([*old, *new]) if n not in ("name", "description", "expected_rows")]
    return [f"{n}: {old.get(n, '-')} -> {new.get(n, '-')}" for n in names if old.get(n, "-") != new.get(n, "-")]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
