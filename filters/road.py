"""The road from metadata to latents: its stages, in order."""

from __future__ import annotations

from filters.recipe import Recipe
from sdtrain.data.stage import Stage

STAGE_NAMES = ("select", "download", "score", "dedup", "keep", "pack", "encode")


def road() -> tuple[Stage[Recipe], ...]:
    """The stages in the order in which they run.

    A function, because the stages bring torch, open_clip and diffusers, for which a help text should not wait.
    """
    from filters.duplicates import DEDUP
    from filters.keep import KEEP
    from filters.metadata import SELECT
    from filters.scores import SCORE
    from sdtrain.data.download import DOWNLOAD
    from sdtrain.data.latents import ENCODE
    from sdtrain.data.pack import PACK

    return (SELECT, DOWNLOAD, SCORE, DEDUP, KEEP, PACK, ENCODE)
