"""What trying the failed rows again brought, as numbers and as one line."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sdtrain.dataset.config import ImageRecipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.download.retry import retry_failed


@dataclass(frozen=True)
class Recovery:
    """Failed rows of finished shards before and after another try.

    Attributes:
        num_failed: rows without an image before.
        num_recovered: of these, rows that have one now.
        num_shards: shards that changed.
        seconds: wall time.
    """

    num_failed: int
    num_recovered: int
    num_shards: int
    seconds: float

    def __str__(self) -> str:
        """One line for terminal and log."""
        if not self.num_failed:
            return "retry-failed: no row has failed"
        return (
            f"retry-failed: {self.num_recovered:,} of {self.num_failed:,} failed rows recovered "
            f"({self.num_shards:,} shards changed), {self.seconds:.1f} s"
        )


def recover(dataset: DatasetDir, recipe: ImageRecipe) -> Recovery:
    """Tries the rows again whose failure may have passed (`retry_failed`), and counts."""
    started = time.monotonic()
    before = {entry.shard: entry for entry in entries(dataset, "download")}
    changed = retry_failed(dataset, recipe)
    return Recovery(
        num_failed=sum(entry.num_in - entry.num_out for entry in before.values()),
        num_recovered=sum(report.num_out - before[report.shard].num_out for report in changed),
        num_shards=len(changed),
        seconds=time.monotonic() - started,
    )
