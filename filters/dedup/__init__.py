"""The DEDUP stage: groups of exact, perceptual, altered, copied and semantic duplicates.

`stage` reads SCORE's output and publishes the groups; `levels` runs exact, `perceptual` (with `hamming`), `altered`
(`signatures` give `proposals`; `comparison` decides after `alignment`), copied and semantic ones (`similar`, with
`clusters`) in turn on `columns`, which `ordering` sorts, and `union_find` joins the linked images.
"""

from filters.dedup.stage import DEDUP

__all__ = ["DEDUP"]
