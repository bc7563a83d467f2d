"""Records finished work: one JSON entry per stage and shard, written last; merges those of the selections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.layout import DatasetDir, current_stage
from sdtrain.dataset.shard_report import Output, ShardReport, parse_entry
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError


def describe_outputs(dataset: DatasetDir, paths: Iterable[Path]) -> dict[str, Output]:
    """Digests and sizes of finished files, by their name inside the dataset."""
    return {dataset.relative(p): Output(sha256=sha256_of(p), bytes=p.stat().st_size) for p in paths}


def write_entry(dataset: DatasetDir, entry: ShardReport, beside: Iterable[Path] = ()) -> None:
    """Records the shard as finished, on S3 first. Call it once every output has its final name.

    Files `beside` are those that its outputs need and the entry does not list.
    """
    path, content = dataset.manifest_entry(entry.stage, entry.shard), entry.model_dump_json(indent=1) + "\n"
    storage_of(dataset).push(path, content.encode(), entry.outputs, beside)
    with publish(path) as temporary:
        temporary.write_text(content)


def forget_entry(dataset: DatasetDir, stage: str, shard: int) -> None:
    """Marks a shard as unfinished, before its outputs change."""
    storage_of(dataset).discard(dataset.manifest_entry(stage, shard))


def read_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport | None:
    """The entry of a finished shard, or None; UserError if another version wrote it, or it is damaged."""
    path = dataset.manifest_entry(stage, shard)
    return parse_entry(path.read_bytes(), path) if path.exists() else None


def require_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport:
    """The entry of an upstream shard to read; UserError if that stage has not finished it."""
    entry = read_entry(dataset, stage, shard)
    if entry is None:
        raise UserError(
            f"Shard {shard:05d} of stage '{stage}' is not finished in {dataset.root}. Run `sdtrain build` (or the "
            "build flow) again: it continues where it stopped."
        )
    return entry


def entries(dataset: DatasetDir, stage: str) -> list[ShardReport]:
    """The entries of a stage's finished shards, in order."""
    folders = dataset.manifest_folders(stage)
    shards = {int(path.stem) for folder in folders for path in folder.glob("[0-9]*.json")}
    return [require_entry(dataset, stage, shard) for shard in sorted(shards)]


def recorded_stages(dataset: DatasetDir) -> list[str]:
    """The names of all stages with finished shards, unordered."""
    return sorted({current_stage(path.name) for path in (dataset.root / "manifest").glob("*") if path.is_dir()})


def is_whole(dataset: DatasetDir, entry: ShardReport) -> bool:
    """Whether every output of the entry still exists, here or on S3, with its recorded size."""
    storage = storage_of(dataset)
    return all(storage.has(name, output.bytes) for name, output in entry.outputs.items())


def selection(dataset: DatasetDir) -> ShardReport:
    """Merges all selections' reports: counts summed, files in shard order; UserError if nothing is selected yet.

    There is the first selection, and one more each time metadata files were added.
    """
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
