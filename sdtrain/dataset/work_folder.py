"""The work folder of a dataset on S3: files come here before they are read, and large ones may leave again.

Tables are fetched before a stage begins, tars when each is opened. A file in the work folder says whether large files
are evicted, so that all who work for one build do the same; tables stay. For a dataset on the local disk all of this
is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, read_entry, recorded_stages
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError

Part = Literal["all shards", "same shard", "first shard"]
"""What a shard of one stage reads of another. "same shard": of its own number, whose large files nobody else reads
afterwards but `pack`, in parts."""
_EVICT = ".s3-evict"


def fetch_inputs(dataset: DatasetDir, inputs: Mapping[str, Part], shards: Sequence[int]) -> None:
    """Fetches the tables that some shards read.

    Args:
        dataset: whose.
        inputs: the stages that are read -> which of their shards.
        shards: that are about to be made.
    """
    if not storage_of(dataset).is_remote:
        return  # nor are all manifest entries read
    for stage, part in inputs.items():
        if part == "first shard":
            fetch_outputs(dataset, stage, [entry.shard for entry in entries(dataset, stage)[:1]], tars=False)
        else:
            fetch_outputs(dataset, stage, shards if part == "same shard" else None, tars=False)


def fetch_tables(dataset: DatasetDir) -> None:
    """Fetches the tables of all stages, for questions about all of them."""
    for stage in recorded_stages(dataset):
        fetch_outputs(dataset, stage, tars=False)


def fetch_outputs(
    dataset: DatasetDir, stage: str, shards: Iterable[int] | None = None, tars: bool = True, as_they_are: bool = False
) -> None:
    """Fetches those outputs of finished shards that are not here.

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
    wanted: dict[str, Output | None] = {}
    for entry in finished:
        for name, output in entry.outputs.items():
            if tars or not name.endswith(".tar"):
                wanted[name] = None if as_they_are else output
    storage.fetch(wanted)


def fetch_shard_file(root: Path, path: Path, stage: str) -> None:
    """Fetches a file of a shard if it is not here.

    Args:
        root: the dataset's directory.
        path: of the file, named by its shard.
        stage: whose output it is.

    Raises:
        UserError: it is not, or no longer, what the manifest here says.
    """
    if path.exists():
        return
    dataset = DatasetDir(root)
    storage = storage_of(dataset)
    if storage.is_remote:
        entry, name = read_entry(dataset, stage, int(path.stem)), dataset.relative(path)
        storage.fetch({name: entry.outputs.get(name) if entry else None})


def keep_local(dataset: DatasetDir, kept: bool) -> None:
    """Says whether the large files of finished shards stay in the work folder.

    Args:
        dataset: locked, with no removal that is under way.
        kept: they stay. If not, those that are there now are evicted too.

    Raises:
        UserError: they are to leave a dataset on the local disk.
    """
    if not storage_of(dataset).is_remote:
        if not kept:
            raise UserError("Only files of a dataset on s3:// can leave this machine. Leave out --no-keep-local.")
        return
    marker = dataset.root / _EVICT
    if kept:
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    evict_finished(dataset)


def evict_finished(dataset: DatasetDir) -> None:
    """Evicts the large files of all finished shards, where they are not to stay."""
    if (dataset.root / _EVICT).exists():
        for entry in (entry for stage in recorded_stages(dataset) for entry in entries(dataset, stage)):
            storage_of(dataset).evict(entry.outputs)


def evict_after(dataset: DatasetDir, entry: ShardReport, sources: Iterable[str]) -> None:
    """Evicts the large files of a shard that was just recorded, and those that only it read.

    Args:
        dataset: whose.
        entry: of the shard.
        sources: stages of which it read the shard of its own number, as nobody else will.
    """
    if not (dataset.root / _EVICT).exists():
        return
    before = [found for source in sources if (found := read_entry(dataset, source, entry.shard))]
    for recorded in (entry, *before):
        storage_of(dataset).evict(recorded.outputs)
