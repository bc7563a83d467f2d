"""Tells which caption a use of a sample had: its alt text, or the one that `data.captions` chose in that step."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sdtrain.exposure.exposures import DROPPED, Exposures
from sdtrain.exposure.trained import Trained, table_folder
from sdtrain.loading.captions import Caption, CaptionMix
from sdtrain.loading.shard_catalog import footer_digest


def caption_of(exposures: Exposures, use: int) -> Caption | None:
    """The caption that the network was given, empty if it was dropped, and its source.

    None where it is not known: of removed samples, and with `data.captions` also of packed images, and where a removal
    has since taken texts or samples out of the shard.
    """
    trained, uses = exposures.chain[int(exposures.uses.runs[use])], exposures.uses
    sample = exposures.located.slice(int(uses.places[use]), 1).to_pylist()[0]
    if sample["caption"] is None:
        return None
    chosen = _chosen(trained, sample, int(uses.steps[use]))
    return Caption(chosen.source, "") if chosen and uses.captions[use] == DROPPED else chosen


def _chosen(trained: Trained, sample: dict[str, Any], step: int) -> Caption | None:
    mix, config = CaptionMix(trained.config.data.captions), trained.config
    if mix.sources and not _is_as_recorded(trained, sample):
        return None
    captions = [Caption(each["source"], each["text"]) for each in sample["captions"] or ()]
    return mix.choose(config.seed, step, sample["uid"], sample["caption"], captions)


def _is_as_recorded(trained: Trained, sample: dict[str, Any]) -> bool:
    """Whether the sample's shard of latents is the very one that the run read."""
    record, table = trained.record, sample["table"]
    if record is None or record.stage != "encode":
        return False
    for dataset, source in zip(trained.datasets, record.sources, strict=True):
        if str(dataset.root) == sample["root"] and table in source.numbers:
            path = table_folder(dataset, "encode") / table
            return source.digests[source.numbers[table]] == _digest(path, path.stat().st_mtime_ns)
    return False


@lru_cache(maxsize=1024)
def _digest(path: Path, changed_ns: int) -> str:
    return footer_digest(path)
