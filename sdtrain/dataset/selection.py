"""Reports the selected rows: of the first selection, and of one more each time metadata files were added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, require_entry
from sdtrain.dataset.shard_report import Output, ShardReport


def selection(dataset: DatasetDir) -> ShardReport:
    """Merges all selections' reports: counts summed, files in shard order; UserError if nothing is selected yet."""
    return _selection(dataset, _changed_ns(dataset))


def selected_shards(dataset: DatasetDir) -> Mapping[int, Output]:
    """Shard number -> its selection file's digest, in order."""
    return _selected_shards(dataset, _changed_ns(dataset))


def num_selected_shards(dataset: DatasetDir, recipe: object) -> int | None:
    """The number of selected shards, for later stages' `Stage.num_shards`; None before the first selection."""
    return len(selected_shards(dataset)) if dataset.manifest_entry("select", 0).exists() else None


def _changed_ns(dataset: DatasetDir) -> tuple[int, ...]:
    folder = dataset.manifest_entry("select", 0).parent
    return tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.json")))


# Both are cached, because every shard's fingerprint asks for them, and at scale they list over 100,000 files.


@lru_cache(maxsize=4)
def _selected_shards(dataset: DatasetDir, changed_ns: tuple[int, ...]) -> Mapping[int, Output]:
    outputs = _selection(dataset, changed_ns).outputs
    return MappingProxyType({int(Path(name).stem): output for name, output in outputs.items()})


@lru_cache(maxsize=4)
def _selection(dataset: DatasetDir, changed_ns: tuple[int, ...]) -> ShardReport:
    require_entry(dataset, "select", 0)
    reports = entries(dataset, "select")
    dropped, outputs = Counter[str](), dict[str, Output]()
    for report in reports:
        dropped.update(report.dropped)
        outputs |= report.outputs
    return ShardReport(
        stage="select",
        shard=0,
        num_in=sum(report.num_in for report in reports),
        num_out=sum(report.num_out for report in reports),
        dropped=dict(dropped),
        outputs=dict(sorted(outputs.items(), key=lambda item: int(Path(item[0]).stem))),
        inputs=[name for report in reports for name in report.inputs],
        notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
    )
