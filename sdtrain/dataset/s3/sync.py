"""Which files a stage reads, and bringing them from S3 before it does: tables at once, tars when each is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sdtrain.dataset.s3.mirror import Stored, mirror_of

if TYPE_CHECKING:
    from sdtrain.dataset.layout import DatasetDir

_INPUTS = {
    "select": ("select",),
    "download": ("select",),
    "score": ("download",),
    "dedup": ("score", "download"),
    "keep": ("select", "download", "score", "dedup"),
    "pack": ("download", "keep"),
    "encode": ("pack",),
}
"""By stage, the stages whose outputs it reads."""
OWN_SHARD = {"score": "download", "encode": "pack"}
"""Stages of which each shard reads the one of its own number, and nobody else does afterwards but `pack`, in parts."""
_PLANNED_BY = ("pack", "encode")


def fetch_inputs(dataset: DatasetDir, stage: str, shards: Sequence[int]) -> None:
    """Brings here what some shards of a stage read; nothing, for a dataset that lies on disk alone."""
    if mirror_of(dataset) is None:
        return
    for name in _INPUTS.get(stage, ()):
        fetch_outputs(dataset, name, shards if stage in OWN_SHARD else None, tars=False)
    if stage == "encode":
        _fetch_first_latents(dataset)


def fetch_plan(dataset: DatasetDir, stage: str) -> None:
    """Brings here what tells how many shards a stage has."""
    if stage in _PLANNED_BY:
        fetch_outputs(dataset, "keep")


def fetch_tables(dataset: DatasetDir) -> None:
    """Brings here the tables of all stages, for questions about all of them."""
    for stage in _INPUTS:
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
    from sdtrain.dataset.manifest import entries, read_entry

    mirror = mirror_of(dataset)
    if mirror is None:
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
    mirror.pull(wanted)


def _fetch_first_latents(dataset: DatasetDir) -> None:
    """latents/info.json holds the figures of the first shard, whoever encodes the others."""
    from sdtrain.dataset.manifest import entries

    first = min((entry.shard for entry in entries(dataset, "encode")), default=None)
    if first is not None:
        fetch_outputs(dataset, "encode", [first], tars=False)
