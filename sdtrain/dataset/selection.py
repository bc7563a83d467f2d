"""Reports the selected rows: of the first selection, and of one more each time metadata files were added."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, require_entry
from sdtrain.dataset.shard_report import Output, ShardReport


def selection(dataset: DatasetDir) -> ShardReport:
    """Merges all selections' reports: counts summed, files in shard order; UserError if nothing is selected yet."""
    folder = dataset.manifest_entry("select", 0).parent
    changed_ns = tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.json")))
    return _selection(dataset, changed_ns)


def selected_shards(dataset: DatasetDir) -> dict[int, Output]:
    """Shard number -> its selection file's digest, in order."""
    return {int(Path(name).stem): output for name, output in selection(dataset).outputs.items()}


def num_selected_shards(dataset: DatasetDir, recipe: object) -> int | None:
    """The number of selected shards, for later stages' `Stage.num_shards`; None before the first selection."""
    selected = entries(dataset, "select")
    return sum(len(entry.outputs) for entry in selected) if selected else None


@lru_cache(maxsize=4)
def _selection(dataset: DatasetDir, changed_ns: tuple[int, ...]) -> ShardReport:
    # Cached, because every shard's fingerprint asks for it, and at scale it lists tens of thousands of files.
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
