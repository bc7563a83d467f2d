"""Pre-download checks of a build: metadata, lists, networks, folder and disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from filters import pipeline
from filters.columns import SCORE_COLUMNS
from filters.recipe import NETWORKS, Recipe, ScoreConfig
from filters.select.lists import list_files
from filters.select.metadata_files import find_metadata
from filters.select.schema import check_columns
from filters.select.score_joins import columns_of, join_files
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.plan.estimate import DatasetJob, Machines, Planner
from sdtrain.plan.rates import load_rates
from sdtrain.preflight.checks import ROOM_IS_SURELY_TOO_SMALL, Check, check_room, check_writable, require
from sdtrain.preflight.networks import check_vae
from sdtrain.settings import Settings

_log = logging.getLogger(__name__)
_ALL = tuple(stage.name for stage in pipeline.STAGES)


class BuildPreflight:
    """Checks a build's needs once, before the first unfinished shard; a finished dataset needs nothing."""

    def __init__(self, dataset: DatasetDir, recipe: Recipe):
        self._dataset, self._recipe = dataset, recipe
        self._is_done = self._is_measured = False

    def __call__(self, stage: str, num_pending: int, num_shards: int) -> None:
        """Checks this and the following stages before a stage's first shard; raises `UserError` with all failures."""
        left = _ALL[_ALL.index(stage) :]
        if not self._is_done:
            self._is_done = True
            for checks in (local_checks, network_checks):  # a mistyped path must not wait for weights to download
                for finding in require(checks(self._dataset, self._recipe, left)):
                    _log.info("%s: %s", finding.name, finding.text)
        if stage != "select" and not self._is_measured:  # the number of rows is now known
            self._is_measured = True
            num_rows = sum(entry.num_out for entry in entries(self._dataset, "select"))
            share = num_pending / max(num_shards, 1)
            for finding in require(sized_checks(self._dataset, self._recipe, num_rows, left, share)):
                _log.info("%s: %s", finding.name, finding.text)


def local_checks(dataset: DatasetDir, recipe: Recipe, stages: Collection[str] = _ALL) -> list[Check]:
    """Returns checks of the output folder, and of the metadata and lists that the stages read."""
    checks = [] if dataset.url else [Check("output", lambda: check_writable(dataset.root))]
    return checks + _select_checks(recipe) if "select" in stages else checks


def network_checks(dataset: DatasetDir, recipe: Recipe, stages: Collection[str] = _ALL) -> list[Check]:
    """Returns checks of the networks that the stages use; published weights are fetched if needed."""
    checks = []
    if "score" in stages:
        checks += _score_checks(recipe.score)
    if "encode" in stages:
        checks.append(Check("encode.vae", lambda: check_vae(recipe.encode.vae)))
    return checks


def sized_checks(
    dataset: DatasetDir, recipe: Recipe, num_rows: int, stages: Collection[str] = _ALL, share: float = 1.0
) -> list[Check]:
    """Returns checks that depend on the number of rows: faiss, and disk space for `share` of the rows in `stages`."""
    wanted = share * _estimate(recipe, num_rows, stages)
    checks = [Check("disk", lambda: check_room(dataset.root, wanted, "The build"))]
    if "dedup" in stages and recipe.duplicates.level == "semantic":
        checks.append(Check("duplicates.level", lambda: _check_semantic(recipe, num_rows)))
    return checks


def size_check_before_selection(dataset: DatasetDir, recipe: Recipe) -> Check:
    """Checks disk space by the subset's known size or all rows; only warns for all, since part will be selected."""

    def check() -> str:
        files = find_metadata(recipe.select.metadata, recipe.select.swapped_sizes)
        known = load_rates().get(f"rows_{recipe.name}")
        numbers = [sum(file.num_rows for file in files), recipe.select.limit, int(known.value) if known else None]
        expected = min(number for number in numbers if number is not None)
        is_bound = expected == numbers[0]
        wanted = _estimate(recipe, expected, _ALL)
        what = f"The build of {'at most ' if is_bound else ''}{expected:,} rows"
        return check_room(dataset.root, wanted, what, surely=0.0 if is_bound else ROOM_IS_SURELY_TOO_SMALL)

    return Check("disk", check)


def _estimate(recipe: Recipe, num_rows: int, stages: Collection[str]) -> float:
    planner = Planner(load_rates(), Machines(1, "h200"))
    sizes = recipe.download.image_size, recipe.encode.resolution, recipe.encode.num_crops
    lines = planner.dataset(DatasetJob(recipe.name, *sizes, num_rows)) if num_rows else []
    return sum(line.disk_bytes for line in lines if line.stage in stages)


def _select_checks(recipe: Recipe) -> list[Check]:
    select = recipe.select
    checks = [Check("select.metadata", lambda: _check_metadata(recipe))]
    checks += [Check(f"select.joins.{n}", partial(_num_files, join_files, join)) for n, join in enumerate(select.joins)]
    for name, lists in (("blocklists", select.blocklists), ("allowlists", select.allowlists)):
        checks += [Check(f"select.{name}.{n}", partial(_num_files, list_files, entry)) for n, entry in enumerate(lists)]
    return checks


def _num_files(find: Callable[[Any], Sequence[object]], config: Settings) -> str:
    return f"{len(find(config))} files"


def _check_metadata(recipe: Recipe) -> str:
    select = recipe.select
    files = find_metadata(select.metadata, select.swapped_sizes)
    may_miss = [column for join in select.joins for column in columns_of(join, join_files(join))]
    check_columns(files, select.rules, [*may_miss, *(SCORE_COLUMNS if select.null_policy == "score_later" else ())])
    return f"{len(files)} files, {sum(file.num_rows for file in files):,} rows"


def _score_checks(config: ScoreConfig) -> list[Check]:
    named = [name for name in NETWORKS if getattr(config, f"{name}_weights") is not None]
    checks = [Check(f"score.{name}_weights", partial(_check_network, config, name)) for name in named]
    return [*checks, Check("score.clip_model", partial(_check_heads, config))] if "clip" in named else checks


def _check_network(config: ScoreConfig, name: str) -> str:
    from filters.score.models import load_network
    from filters.score.stage import weight_digest

    digest = weight_digest(config, name)
    load_network(config, name)
    return f"{getattr(config, f'{name}_weights')}: {digest[:12]}"


def _check_heads(config: ScoreConfig) -> str:
    from filters.score.models import check_heads

    check_heads(config)
    return config.clip_model


def _check_semantic(recipe: Recipe, num_rows: int) -> str:
    from filters.dedup.clusters import load_faiss, num_clusters_for

    num_clusters = num_clusters_for(num_rows, recipe.duplicates.num_clusters)
    if num_clusters > 1:
        load_faiss()
    return f"semantic, {num_clusters:,} clusters"
