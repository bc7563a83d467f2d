"""Work folders that stay small: large files leave them once they are on S3, and come back when they are read.

Whether they do is said by a file in the work folder, so that all who work for one build do the same. Tables stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sdtrain.dataset.s3.mirror import mirror_of
from sdtrain.dataset.s3.sync import OWN_SHARD
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from sdtrain.dataset.layout import DatasetDir
    from sdtrain.dataset.shard_report import ShardReport

_FILE = ".s3-evict"
TAR_STAGES = ("download", "pack", "encode")
"""Those that write tars."""


def keep_local(dataset: DatasetDir, kept: bool) -> None:
    """Says what becomes of the large files of finished shards; of a dataset that lies on disk alone, nothing.

    Args:
        dataset: locked, with no removal that is under way.
        kept: they stay in the work folder. If not, those that are there now leave it too.

    Raises:
        UserError: they are to leave a dataset that lies on disk alone.
    """
    if mirror_of(dataset) is None:
        if not kept:
            raise UserError("Only files of a dataset on s3:// can leave this machine. Leave out --no-keep-local.")
        return
    marker = dataset.root / _FILE
    if kept:
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    evict_finished(dataset)


def evict_finished(dataset: DatasetDir, stages: Iterable[str] = TAR_STAGES) -> None:
    """Lets go of the large files of all finished shards, where they are not to stay."""
    from sdtrain.dataset.manifest import entries

    if (dataset.root / _FILE).exists():
        for entry in (entry for stage in stages for entry in entries(dataset, stage)):
            _evict(dataset, entry)


def evict_after(dataset: DatasetDir, entry: ShardReport) -> None:
    """Lets go of what a shard that was just recorded consists of, and of what only it reads."""
    from sdtrain.dataset.manifest import read_entry

    if not (dataset.root / _FILE).exists():
        return
    _evict(dataset, entry)
    if source := OWN_SHARD.get(entry.stage):
        before = read_entry(dataset, source, entry.shard)
        if before:
            _evict(dataset, before)


def _evict(dataset: DatasetDir, entry: ShardReport) -> None:
    """Only what S3 has just now: objects may have been deleted by hand, or by a rule of the bucket."""
    mirror = mirror_of(dataset)
    if mirror is None or dataset.removal.exists():  # a removal's files are ahead of their entries
        return
    for name, output in entry.outputs.items():
        path = dataset.root / name
        if name.endswith(".tar") and path.exists() and mirror.store.digest(name) == output.sha256:
            path.unlink()
