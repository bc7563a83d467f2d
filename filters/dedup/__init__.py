"""The stage DEDUP: groups of exact, perceptual and semantic duplicates.

`stage` reads what SCORE wrote and publishes the groups; `levels` runs `exact`, `perceptual` (with `hamming`)
and `semantic` (with `clusters`) one after the other on `columns`, and `union_find` joins what they link.
"""

from filters.dedup.stage import DEDUP

__all__ = ["DEDUP"]
