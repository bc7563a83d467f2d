"""The road from metadata to latents: its stages, in order."""

from __future__ import annotations

from filters.recipe import Recipe
from sdtrain.dataset.stage import Stage

STAGE_NAMES = ("select", "download", "score", "dedup", "keep", "pack", "encode")


def road() -> tuple[Stage[Recipe], ...]:
    """The stages in the order in which they run.

    A function, because the stages bring torch, open_clip and diffusers, for which a help text should not wait.
    """
    from filters.decide.stage import KEEP
    from filters.dedup import DEDUP
    from filters.score.stage import SCORE
    from filters.select.stage import SELECT
    from sdtrain.download.stage import DOWNLOAD
    from sdtrain.encode.stage import ENCODE
    from sdtrain.pack.stage import PACK

    return (SELECT, DOWNLOAD, SCORE, DEDUP, KEEP, PACK, ENCODE)
