"""Pre-download checks of a build: metadata, lists, networks, folder and disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from filters import pipeline
from filters.planned import dataset_job
from filters.recipe import Recipe
from filters.select.metadata_files import metadata_of, num_rows_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.stage import Openers, Stage
from sdtrain.dataset.work import Work
from sdtrain.plan.estimate import Machines, Planner, not_counted
from sdtrain.plan.rates import load_rates
from sdtrain.preflight.checks import ROOM_IS_SURELY_TOO_SMALL, Check, check_room, check_writable, require

Stages = Sequence[Stage[Recipe]]
_log = logging.getLogger(__name__)


class BuildPreflight:
    """Checks a build's needs once, before the first unfinished shard; a finished dataset needs nothing."""

    def __init__(self, dataset: DatasetDir, recipe: Recipe):
        self._dataset, self._recipe = dataset, recipe
        self._is_done = self._is_measured = False

    def __call__(self, stage: str, num_pending: int, num_shards: int) -> None:
        """Checks this and the following stages before a stage's first shard; raises `UserError` with all failures."""
        place = [known.name for known in pipeline.STAGES].index(stage)
        left = [known for known in pipeline.STAGES[place:] if known.is_on(self._recipe)]
        if not self._is_done:
            self._is_done = True
            for checks in (local_checks, network_checks):  # a mistyped path must not wait for weights to download
                for finding in require(checks(self._dataset, self._recipe, left)):
                    _log.info("%s: %s", finding.name, finding.text)
        if place > 0 and not self._is_measured:  # the number of rows is now known
            self._is_measured = True
            num_rows = sum(entry.num_out for entry in entries(self._dataset, pipeline.STAGES[0].name))
            share = num_pending / max(num_shards, 1)
            for finding in require(sized_checks(self._dataset, self._recipe, num_rows, left, share)):
                _log.info("%s: %s", finding.name, finding.text)


def local_checks(dataset: DatasetDir, recipe: Recipe, stages: Stages | None = None) -> list[Check]:
    """Returns checks of the output folder, and of the files that the stages (by default all) open."""
    output = Check("output", lambda: check_writable(dataset.root))
    opened = _checks(stage.needs.files(recipe) for stage in stages or pipeline.stages_of(recipe))
    return opened if dataset.url else [output, *opened]


def network_checks(dataset: DatasetDir, recipe: Recipe, stages: Stages | None = None) -> list[Check]:
    """Returns checks of the networks that the stages (by default all) use; published weights are fetched if needed."""
    return _checks(stage.needs.networks(recipe) for stage in stages or pipeline.stages_of(recipe))


def sized_checks(dataset: DatasetDir, recipe: Recipe, num_rows: int, stages: Stages, share: float) -> list[Check]:
    """Returns checks that depend on the number of rows, such as of the disk space for `share` of them in `stages`."""
    wanted = share * _estimate(recipe, num_rows, stages)
    room = Check("disk", lambda: check_room(dataset.root, wanted, "The build") + _left_out(stages))
    return [room, *_checks(stage.needs.sized(recipe, num_rows) for stage in stages)]


def _checks(needs: Iterable[Openers]) -> list[Check]:
    return [Check(name, opener) for openers in needs for name, opener in openers.items()]


def size_check_before_selection(dataset: DatasetDir, recipe: Recipe) -> Check:
    """Checks disk space by the subset's known size or all rows; only warns for all, since part will be selected."""

    def check() -> str:
        files = metadata_of(recipe.select)
        known = load_rates().get(f"rows_{recipe.name}")
        numbers = [num_rows_of(files), recipe.select.limit, int(known.value) if known else None]
        expected = min((number for number in numbers if number is not None), default=None)
        if expected is None:
            return f"{len(files)} files of text, whose rows are counted when they are read"
        is_bound = expected == numbers[0]
        stages = pipeline.stages_of(recipe)
        wanted = _estimate(recipe, expected, stages)
        what = f"The build of {'at most ' if is_bound else ''}{expected:,} rows"
        surely = 0.0 if is_bound else ROOM_IS_SURELY_TOO_SMALL
        return check_room(dataset.root, wanted, what, surely=surely) + _left_out(stages)

    return Check("disk", check)


def _estimate(recipe: Recipe, num_rows: int, stages: Stages) -> float:
    planner = Planner(load_rates(), Machines(1, "h200"))
    lines = planner.dataset(dataset_job(recipe, num_rows), _work(stages)) if num_rows else []
    return sum(line.disk_bytes for line in lines)


def _left_out(stages: Stages) -> str:
    names = not_counted(_work(stages))
    return f"; not counted: {', '.join(names)}" if names else ""


def _work(stages: Stages) -> dict[str, Work | None]:
    return {stage.name: stage.work for stage in stages}
