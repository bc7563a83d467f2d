"""Columns that several stages name."""

from __future__ import annotations

SCORE_COLUMNS = ("aesthetic", "aesthetic_v1", "pwatermark", "punsafe", "similarity")
QUALITY_COLUMNS = ("sharpness", "entropy", "border", "contrast")
UNDECODABLE = "undecodable"
"""The reason of an image that no decoder reads."""
