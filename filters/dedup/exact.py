"""Exact duplicates: equal pixels, or equal bytes as they were fetched."""

from __future__ import annotations

import numpy as np

from filters.dedup.columns import Columns, in_order, starts_of_runs
from filters.dedup.union_find import Components
from sdtrain.dataset.progress import report_progress


def link_exact(columns: Columns, components: Components) -> None:
    """Links each image to the first of the same digest, of the decoded pixels or of the file; no image is decoded.

    Files are the same more seldom than pixels, but adopted shards may hold one file re-encoded twice, differently.
    """
    for kind in ("pixels", "bytes"):
        pieces = in_order(columns.words(f"{kind}0"), columns.words(f"{kind}1"))
        counted = report_progress(pieces, f"dedup: equal {kind}", columns.num, "images", lambda piece: len(piece[0]))
        for nodes, ones, others in counted:
            starts = starts_of_runs(ones, others)
            first = nodes[starts][np.cumsum(starts) - 1]
            linked = (first != nodes) & ((ones | others) != 0)  # zero: the digest is not known
            components.link(first[linked], nodes[linked])
