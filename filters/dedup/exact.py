"""Exact duplicates: equal pixels, or equal bytes as downloaded."""

from __future__ import annotations

import numpy as np

from filters.dedup.columns import Columns, in_order, starts_of_runs
from filters.dedup.union_find import Components
from sdtrain.dataset.progress import report_progress


def link_exact(columns: Columns, components: Components) -> None:
    """Links each image to the first with the same digest of pixels or file; decodes no image.

    Equal files seldom have different pixels, but reused shards may hold two different re-encodings of one file.
    """
    for kind in ("pixels", "bytes"):
        pieces = in_order(columns.words(f"{kind}0"), columns.words(f"{kind}1"))
        counted = report_progress(pieces, f"dedup: equal {kind}", columns.num, "images", lambda piece: len(piece[0]))
        for nodes, ones, others in counted:
            starts = starts_of_runs(ones, others)
            first = nodes[starts][np.cumsum(starts) - 1]
            linked = (first != nodes) & ((ones | others) != 0)  # zero: unknown digest
            components.link(first[linked], nodes[linked])
