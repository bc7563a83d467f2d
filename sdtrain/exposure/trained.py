"""Lists the optimizer steps behind a model: those of its run, and of each run that it descends from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import TrainConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.open import dataset_at
from sdtrain.errors import UserError
from sdtrain.exposure.lineage import Ancestor, lineage
from sdtrain.loading.planning import digest_of_sources
from sdtrain.loading.sample_record import RecordedSource, SampleRecord, Stage
from sdtrain.loading.shard_catalog import Catalogue
from sdtrain.loading.substitutes import Substitutes, read_substitutes
from sdtrain.training.run_dir import RunDir

Opened = Callable[[str, Stage], DatasetDir]
"""(dataset as a run names it, whose shards it reads) -> the dataset, with these shards' tables."""


@dataclass(frozen=True)
class Trained:
    """Optimizer steps [0, num_steps) of a run.

    `record` is None where `remarks`, which hold whatever limits an answer, say why its samples are not known.
    """

    run: Path
    config: TrainConfig
    num_steps: int
    record: SampleRecord | None
    datasets: tuple[DatasetDir, ...]
    substitutes: Substitutes
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run; `step` counts the optimizer steps done."""

    run: Path
    step: int
    path: Path


def at_hand(name: str, stage: Stage) -> DatasetDir:
    """A dataset as it is on this machine: an `Opened` that fetches nothing."""
    return dataset_at(name)


def trained_steps(run: Path, opened: Opened = at_hand) -> tuple[list[Trained], list[str]]:
    """The steps behind a run's newest state, from the first run to this one, and what cannot be known of their origin.

    UserError if `run` is no run, or a record is damaged.
    """
    chain = lineage(run)
    found: list[Trained] = []
    num_steps, assumed = chain[-1].step or 0, ""
    for link in reversed(chain):
        if link.config is None:
            return found[::-1], [f"{link.source} is not at hand as a run: what it was trained on is not known."]
        trained = _trained(link, link.config, num_steps, opened, assumed)
        found.append(trained)
        num_steps, assumed = _steps_before(trained, chain)
    return found[::-1], []


def _trained(link: Ancestor, config: TrainConfig, num_steps: int, opened: Opened, assumed: str) -> Trained:
    run, stage = Path(link.source), _stage(config)
    datasets = tuple(opened(source.root, stage) for source in config.data.all_sources)
    remarks = [assumed] if assumed else []
    record = SampleRecord.read(RunDir(run).samples)
    if record is None:
        record, missing = _record_now(run, config, datasets)
        remarks += [missing] if missing else []
    substitutes = read_substitutes(RunDir(run).substitutes)
    return Trained(run, config, num_steps, record, datasets, substitutes, (*remarks, *_remarks(run, substitutes)))


def _steps_before(trained: Trained, chain: list[Ancestor]) -> tuple[int, str]:
    """The steps of the run that `trained` began with, and a sentence where they are only assumed."""
    place = next(number for number, link in enumerate(chain) if Path(link.source) == trained.run)
    if not place:
        return 0, ""
    before, origin = chain[place - 1], trained.record.origin if trained.record else None
    if origin is not None:
        return origin.step, ""
    name = Path(trained.config.init_from or "").name
    if name.startswith("step-") and name[5:].isdigit():
        return int(name[5:]), ""
    step = before.step or 0
    return step, (
        f"{trained.run} did not record with which checkpoint of {before.source} it began: all {step:,} steps of that "
        "run are counted."
    )


def _remarks(run: Path, substitutes: Substitutes) -> Iterator[str]:
    """What the run's log says of steps that did not go by the plan."""
    rows = RunDir(run).log.rows()
    begun = substitutes.recorded_from
    before = rows if begun is None else [row for row in rows if int(row["step"]) <= begun]
    if num := max((int(float(row.get("num_substituted") or 0)) for row in before), default=0):
        yield (
            f"{run} replaced unreadable samples by others (data.on_corrupt: skip; {num:,} samples), without "
            "recording which: some uses were of another sample than is said here."
        )
    if substitutes.full_from is not None:
        yield (
            f"{run} replaced more unreadable samples by others than it recorded: from step "
            f"{substitutes.full_from:,} on some uses were of another sample than is said here."
        )
    if rows and (num := int(float(rows[-1].get("num_skipped") or 0))):
        yield f"{run} skipped {num:,} steps, which drew their samples without learning from them; they count here."


def _record_now(
    run: Path, config: TrainConfig, datasets: tuple[DatasetDir, ...]
) -> tuple[SampleRecord | None, str | None]:
    """The record that older versions did not write, if the datasets are unchanged since; else why there is none."""
    stated = _data_digest(run)
    if stated is None:
        return None, f"{run} has neither a record of its samples nor a checkpoint that identifies its data."
    stage = _stage(config)
    try:
        sizes = _sizes(config, datasets[0])
        folders = [table_folder(dataset, stage) for dataset in datasets]
        catalogues = [Catalogue(folder, sizes) for folder in folders]
    except (OSError, ValueError, KeyError, UserError) as error:
        return None, f"{run} has no record of its samples, and its data cannot be read: {error}"
    digests = [catalogue.digest for catalogue in catalogues]
    weights = [source.weight for source in config.data.all_sources]
    found = digests[0] if len(digests) == 1 else digest_of_sources(digests, weights)
    if found != stated:
        return None, (
            f"{run} is of a version that did not record what its samples' numbers mean, and {config.data.name} has "
            "changed since: which samples its steps saw cannot be known."
        )
    sources = [
        RecordedSource.of(str(dataset), catalogue.shards)
        for dataset, catalogue in zip(datasets, catalogues, strict=True)
    ]
    return SampleRecord(stage, tuple(sizes), tuple(sources)), None


def _stage(config: TrainConfig) -> Stage:
    return "pack" if config.data.online_vae else "encode"


def table_folder(dataset: DatasetDir, stage: Stage) -> Path:
    """The folder of the tables that training reads."""
    return (dataset.latents_table(0) if stage == "encode" else dataset.packed_table(0)).parent


def _sizes(config: TrainConfig, dataset: DatasetDir) -> list[tuple[int, int]]:
    side = config.data.resolution // 8
    if config.data.online_vae:
        return [(side, side)]
    buckets = json.loads(dataset.latents_info.read_text()).get("buckets")
    return [(height // 8, width // 8) for width, height in buckets] if buckets else [(side, side)]


def _data_digest(run: Path) -> str | None:
    for path in sorted(run.glob("checkpoints/step-[0-9]*/layout.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text())["data_digest"])
    return None


def last_clean_checkpoint(chain: list[Trained], number: int, step: int) -> Checkpoint | None:
    """The newest checkpoint at hand from before step `step` (from 0) of run `number`; None if none is.

    It may be of an earlier run of the chain, as far as the next one began with it or a later one.
    """
    limit = step
    for trained in reversed(chain[: number + 1]):
        found = [checkpoint for checkpoint in checkpoints_of(trained.run) if checkpoint.step <= limit]
        if found:
            return found[-1]
        place = chain.index(trained)
        limit = chain[place - 1].num_steps if place else 0
    return None


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """The finished checkpoints of a run, oldest first."""
    found = []
    for path in run.glob("checkpoints/step-[0-9]*/layout.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.append(Checkpoint(run, int(json.loads(path.read_text())["step"]), path.parent))
    return sorted(found, key=lambda checkpoint: checkpoint.step)
