"""Copies among the pictures: exact, perceptual, semantic.

`stage` reads what SCORE wrote and publishes the groups; `groups` runs the levels `exact`, `perceptual` (with `hamming`)
and `semantic` (with `clusters` and `buckets`) one after the other on `columns`, and `components` joins what they link.
"""

from filters.duplicates.stage import DEDUP

__all__ = ["DEDUP"]
