"""Files of a dataset on S3 come here before they are read, and leave the work folder again where it is to stay small.

Tables come before a stage begins, tars when each is opened. Whether large files leave is said by a file in the work
folder, so that all who work for one build do the same; tables stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import Stored
from sdtrain.dataset.manifest import ShardReport, entries, read_entry, recorded_stages
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError

Part = Literal["all shards", "same shard", "first shard"]
"""What a shard of one stage reads of another. "same shard": of its own number, whose large files nobody else reads
afterwards but `pack`, in parts."""
_FILE = ".s3-evict"


def fetch_inputs(dataset: DatasetDir, inputs: Mapping[str, Part], shards: Sequence[int]) -> None:
    """Brings here the tables that some shards read; nothing, for a dataset that lies on disk alone.

    Args:
        dataset: whose.
        inputs: the stages that are read -> which of their shards.
        shards: that are about to be made.
    """
    if not storage_of(dataset).is_remote:
        return
    for stage, part in inputs.items():
        if part == "first shard":
            fetch_outputs(dataset, stage, [entry.shard for entry in entries(dataset, stage)[:1]], tars=False)
        else:
            fetch_outputs(dataset, stage, shards if part == "same shard" else None, tars=False)


def fetch_tables(dataset: DatasetDir) -> None:
    """Brings here the tables of all stages, for questions about all of them."""
    for stage in recorded_stages(dataset):
        fetch_outputs(dataset, stage, tars=False)


def fetch_outputs(
    dataset: DatasetDir, stage: str, shards: Iterable[int] | None = None, tars: bool = True, as_they_are: bool = False
) -> None:
    """Brings here what some finished shards of a stage consist of, if it is not here.

    Args:
        dataset: whose.
        stage: its name.
        shards: which; default: all that are finished.
        tars: the large files too.
        as_they_are: also files that are not those of the manifest, as an interrupted removal leaves them.

    Raises:
        UserError: an object is missing, or is not what the manifest says.
    """
    storage = storage_of(dataset)
    if not storage.is_remote:
        return
    if shards is None:
        finished = entries(dataset, stage)
    else:
        finished = [entry for shard in shards if (entry := read_entry(dataset, stage, shard))]
    wanted: dict[str, Stored | None] = {}
    for entry in finished:
        for name, output in entry.outputs.items():
            if tars or not name.endswith(".tar"):
                wanted[name] = None if as_they_are else output
    storage.pull(wanted)


def keep_local(dataset: DatasetDir, kept: bool) -> None:
    """Says what becomes of the large files of finished shards; of a dataset that lies on disk alone, nothing.

    Args:
        dataset: locked, with no removal that is under way.
        kept: they stay in the work folder. If not, those that are there now leave it too.

    Raises:
        UserError: they are to leave a dataset that lies on disk alone.
    """
    if not storage_of(dataset).is_remote:
        if not kept:
            raise UserError("Only files of a dataset on s3:// can leave this machine. Leave out --no-keep-local.")
        return
    marker = dataset.root / _FILE
    if kept:
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    evict_finished(dataset)


def evict_finished(dataset: DatasetDir) -> None:
    """Evicts the large files of all finished shards, where they are not to stay."""
    if (dataset.root / _FILE).exists():
        for entry in (entry for stage in recorded_stages(dataset) for entry in entries(dataset, stage)):
            _evict(dataset, entry)


def evict_after(dataset: DatasetDir, entry: ShardReport, sources: Iterable[str]) -> None:
    """Evicts the large files of a shard that was just recorded, and those that only it read.

    Args:
        dataset: whose.
        entry: of the shard.
        sources: stages of which it read the shard of the same number.
    """
    if not (dataset.root / _FILE).exists():
        return
    _evict(dataset, entry)
    for source in sources:
        if before := read_entry(dataset, source, entry.shard):
            _evict(dataset, before)


def _evict(dataset: DatasetDir, entry: ShardReport) -> None:
    """Only what S3 has just now: objects may have been deleted by hand, or by a rule of the bucket."""
    if dataset.removal.exists():  # a removal's files are ahead of their entries
        return
    storage = storage_of(dataset)
    for name, output in entry.outputs.items():
        path = dataset.root / name
        if name.endswith(".tar") and path.exists() and storage.has_copy(name, output.sha256):
            path.unlink()
