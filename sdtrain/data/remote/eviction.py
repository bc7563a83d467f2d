"""Work folders that stay small: large files leave them once they are on S3, and come back when they are read.

Whether they do is said by a file in the work folder, so that all who work for one build do the same. Tables stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdtrain.data.remote.inputs import OWN_SHARD
from sdtrain.data.remote.mirror import mirror_of

if TYPE_CHECKING:
    from sdtrain.data.dataset import DatasetDir
    from sdtrain.data.manifest import ShardReport

_FILE = ".s3-evict"
_STAGES = ("download", "pack", "encode")
"""Those that write tars."""


def keep_local(dataset: DatasetDir, kept: bool) -> None:
    """Says what becomes of the large files of finished shards; of a dataset that lies on disk alone, nothing.

    Args:
        dataset: of which nothing is being read.
        kept: they stay in the work folder. If not, those that are there now leave it too.
    """
    from sdtrain.data.manifest import entries

    if mirror_of(dataset) is None:
        return
    marker = dataset.root / _FILE
    if kept:
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    for entry in (entry for stage in _STAGES for entry in entries(dataset, stage)):
        _evict(dataset, entry)


def evict_after(dataset: DatasetDir, entry: ShardReport) -> None:
    """Lets go of what a shard that was just recorded consists of, and of what only it reads."""
    from sdtrain.data.manifest import read_entry

    if not (dataset.root / _FILE).exists() or dataset.removal.exists():
        return
    _evict(dataset, entry)
    if source := OWN_SHARD.get(entry.stage):
        before = read_entry(dataset, source, entry.shard)
        if before:
            _evict(dataset, before)


def _evict(dataset: DatasetDir, entry: ShardReport) -> None:
    """What has an entry here is whole on S3."""
    for name in entry.outputs:
        if name.endswith(".tar"):
            (dataset.root / name).unlink(missing_ok=True)
