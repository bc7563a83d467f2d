"""The pipeline from metadata to latents: its stages in order. A new stage is one folder and its name here."""

from __future__ import annotations

from collections.abc import Sequence

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.recipe import Recipe
from filters.score.stage import SCORE
from filters.select.stage import SELECT
from sdtrain.dataset.stage import Stage
from sdtrain.download.stage import DOWNLOAD
from sdtrain.encode.stage import ENCODE
from sdtrain.pack.stage import PACK


def in_order(*stages: Stage[Recipe]) -> tuple[Stage[Recipe], ...]:
    """Returns the stages after checking that each names only itself and earlier ones.

    Raises:
        ValueError: one does not, or two share a name or view.
    """
    known = set[str]()
    for stage in stages:
        known.add(stage.name)
        if unknown := {*stage.inputs, *filter(None, [stage.planned_by])} - known:
            raise ValueError(f"stage '{stage.name}' reads {', '.join(sorted(unknown))}, which is no stage before it")
    _refuse_twice([stage.name for stage in stages])
    _refuse_twice([stage.table.view for stage in stages if stage.table])
    return stages


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two stages have the name or view '{name}'")


# Users say `pipeline.STAGES`: the list can then be changed in one place.
STAGES = in_order(SELECT, DOWNLOAD, SCORE, DEDUP, DECIDE, PACK, ENCODE)
