"""Dataset builds: lock, recorded recipe, stages in order, then views and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from filters.build_options import BuildOptions
from filters.decide.funnel import funnel
from filters.decide.losses import heavy_losses
from filters.recipe import Recipe
from filters.recipe_record import output_dataset, record_recipe, require_metadata, with_precision, with_source
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.progress import StageTotals
from sdtrain.dataset.stage import Stage
from sdtrain.dataset.sync import keep_local

if TYPE_CHECKING:
    from filters.preflight import BuildPreflight


@dataclass(frozen=True)
class Build:
    """A build in progress, with its dataset locked.

    `recipe` is as recorded, with each `auto` resolved; `options` are those outside it. `changes` are differences from
    the previous run's recipe, whose work is redone; `preflight` is called before a stage's first shard.
    """

    dataset: DatasetDir
    recipe: Recipe
    options: BuildOptions
    changes: str
    preflight: BuildPreflight

    def run(
        self,
        run_stage: Callable[[Stage[Recipe]], StageTotals],
        retry_failed: Callable[[], object],
        warn: Callable[[str], object],
    ) -> None:
        """Runs the stages in order with `run_stage`; the options may ask for `retry_failed` before the download.

        `warn` is called with a sentence for each reason that dropped nearly all samples, once its stage has ended.
        """
        from filters.pipeline import stages_of

        stages = stages_of(self.recipe)
        for number, stage in enumerate(stages, 1):
            if self.options.retry_failed and stage.name == "download":
                retry_failed()
            if run_stage(stage).num_shards and stage.drops:
                rows = funnel(self.dataset, self.recipe, stages[:number])
                for sentence in heavy_losses(rows, self.recipe, stage.name):
                    warn(sentence)


@contextmanager
def open_build(recipe: Recipe, options: BuildOptions, command: str) -> Iterator[Build]:
    """Locks the dataset for a build and finishes it at the end unless the build fails.

    `recipe` has the options applied; the lock names `command` to others. UserError if the recipe names no metadata, or
    another command is changing the dataset.
    """
    from filters.inspect.report import finish_dataset
    from filters.preflight import BuildPreflight
    from filters.remove.apply import finish_interrupted_removal

    dataset = output_dataset(options.output, recipe, options.work_dir)
    if not (recipe.source or dataset.url or dataset.recipe.exists()):  # which may say that it was imported
        require_metadata(recipe)
    with lock_to_change(dataset, command):
        finish_interrupted_removal(dataset)
        recipe = with_source(dataset, recipe)
        recipe = with_precision(dataset, recipe)
        changes = "; ".join(record_recipe(dataset, recipe))
        keep_local(dataset, options.keep_local)
        yield Build(dataset, recipe, options, changes, BuildPreflight(dataset, recipe))
        finish_dataset(dataset, recipe)
