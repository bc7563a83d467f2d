"""The training data of an evaluation's models, and what it shares with the evaluation."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from filters.contamination.signatures import SignatureJob, prepare_signatures, signature_stage
from filters.contamination.stage import OF_IMAGES, OF_PROMPTS, RADIUS, THRESHOLD, TrainingJob, training_stage
from filters.recipe import ScoreConfig
from filters.recipe_record import read_recipe
from filters.search.search import is_stand_in
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry, require_entry, selected_shards
from sdtrain.dataset.open import open_dataset
from sdtrain.dataset.sync import fetch_outputs
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError
from sdtrain.evaluation.contamination import Contamination, Found, Occurrences
from sdtrain.evaluation.layout import EvaluationDir
from sdtrain.evaluation.models import EvaluatedModel, run_of
from sdtrain.evaluation.prompts import digest_of
from sdtrain.evaluation.sweep import Step, Sweep
from sdtrain.exposure.lineage import lineage
from sdtrain.models.weights import clip_digest
from sdtrain.preflight.checks import Check

# One pass over the decisions, in memory for what was found.
_KEPT = """
SELECT way, item, min(uid) AS uid
FROM (SELECT uid FROM read_parquet($decisions) WHERE reason IS NULL) JOIN read_parquet($found) USING (uid)
GROUP BY way, item ORDER BY way, item
"""


@dataclass(frozen=True)
class Hit:
    """An item of the evaluation, and a sample of the dataset in which it was recognised."""

    way: str
    item: int
    uid: str


@dataclass(frozen=True)
class TrainingDataset:
    """A dataset that models were trained on; `notes` say what cannot be compared.

    `job` searches it for prompts and reference images, `further_job` for the prompts of `Sweep.following`, if any.
    """

    job: TrainingJob
    further_job: TrainingJob | None = None
    notes: tuple[str, ...] = ()

    def described(self) -> str:
        """Its name, with the number of samples in it."""
        return f"{self.job.training}: {require_entry(self.job.training, 'decide', 0).num_out:,} samples"


def hits_of(job: TrainingJob, directory: DatasetDir) -> list[Hit]:
    """What a job found among the samples that were kept, each item once for each way."""
    found = [str(job.path(directory, part)) for part in job.parts]
    fetch_outputs(job.training, "decide")
    with connected() as connection:
        asked = {"found": found, "decisions": str(job.training.decisions)}
        return [Hit(*row) for row in connection.execute(_KEPT, asked).fetchall()] if found else []


@dataclass(frozen=True)
class TrainingDataSearch:
    """Searches the training data of a sweep's models; implements `sdtrain.evaluation.contamination.TrainingSearch`.

    `datasets` are by a model's label; `unknown` says in sentences why a model has none.
    """

    sweep: Sweep
    datasets: Mapping[str, Sequence[TrainingDataset]]
    unknown: Sequence[str] = ()

    def checks(self) -> list[Check]:
        """The weights of CLIP, as the datasets were scored with it."""
        clips = dict.fromkeys(job.clip for job in self._signatures if job.clip)
        return [
            Check("training data", lambda clip=clip: _checked_clip(clip))  # type: ignore[misc]
            for clip in clips
        ]

    def steps(self) -> list[Step]:
        """Signatures of the reference images, then one pass over each dataset."""
        steps = [Step(signature_stage(), job.directory, job) for job in self._signatures]
        return steps + [Step(training_stage(job), directory, job) for directory, job in self._jobs]

    def found(self) -> dict[str, Found]:
        """What each model's data shares with the evaluation; contamination.csv lists it."""
        hits = {job: hits_of(job, directory) for directory, job in self._jobs}
        found = {model: self._found(some, hits) for model, some in self.datasets.items()}
        self._write(hits)
        return found

    def notes(self) -> list[str]:
        """Why a model's data was not searched."""
        return list(self.unknown)

    @property
    def _all(self) -> list[TrainingDataset]:
        return list({each.job: each for some in self.datasets.values() for each in some}.values())

    @property
    def _signatures(self) -> list[SignatureJob]:
        return list(dict.fromkeys(each.job.signatures for each in self._all if each.job.signatures))

    @property
    def _jobs(self) -> list[tuple[EvaluationDir, TrainingJob]]:
        jobs = [(self.sweep.directory, each.job) for each in self._all]
        following = self.sweep.following
        return jobs + [(following.directory, each.further_job) for each in self._all if following and each.further_job]

    def _found(self, datasets: Sequence[TrainingDataset], hits: Mapping[TrainingJob, Sequence[Hit]]) -> Found:
        own = [hit for each in datasets for hit in hits[each.job]]
        further = [hit for each in datasets if each.further_job for hit in hits[each.further_job]]
        prompts, images = _by_way(own, OF_PROMPTS), _by_way(own, OF_IMAGES)
        judged, num_images = _by_way(further, OF_PROMPTS), len(self.sweep.reference.places)
        texts = self.sweep.following.texts if self.sweep.following else ()
        record = Contamination(
            training_data=[each.described() for each in datasets],
            method=_method(datasets, num_images),
            prompts=_occurrences(self.sweep.protocol.num_prompts, prompts),
            reference=_occurrences(num_images, images) if num_images else None,
            further_prompts=_occurrences(len(texts), judged) if texts else None,
            notes=list(dict.fromkeys(note for each in datasets for note in each.notes)),
        )
        return Found(_union(prompts), _union(images), _union(judged), record)

    def _write(self, hits: Mapping[TrainingJob, Sequence[Hit]]) -> None:
        path = self.sweep.directory.root / "contamination.csv"
        with publish(path) as temporary, temporary.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["training_data", "kind", "number", "item", "way", "training_uid"])
            for each in self._all:
                for job in (each.job, each.further_job):
                    rows = hits[job] if job else ()
                    table.writerows([job.training, *self._named(job, hit), hit.way, hit.uid] for hit in rows if job)

    def _named(self, job: TrainingJob, hit: Hit) -> list[Any]:
        following = self.sweep.following
        if following and job.prompts != self.sweep.prompts.digest:
            return ["prompt with questions", hit.item, following.texts[hit.item]]
        if hit.way in OF_PROMPTS:
            return ["prompt", hit.item, self.sweep.prompts.texts[hit.item]]
        place = self.sweep.reference.places[hit.item]
        return ["reference", hit.item, place.path if place.size < 0 else f"{place.path} at byte {place.offset}"]


def search_training_data(sweep: Sweep, named: Sequence[str] = ()) -> Sweep:
    """The sweep, with a search of its models' training data for its prompts and reference images.

    A run's data is known from its config and those of the runs that it began from; `named` datasets count for every
    model besides. UserError if a named one is no finished dataset; others that are not here are told in the results.
    """
    extra = [_opened(name, sweep) for name in named]
    datasets, unknown = dict[str, list[TrainingDataset]](), list[str]()
    for model in sweep.models:
        recorded = _recorded(model)
        found = list(extra)
        for root in recorded:
            try:
                found.append(_opened(root, sweep))
            except UserError as error:
                unknown.append(f"Contamination by {root}, on which {model.label} was trained, is not known: {error}")
        if found:
            datasets[model.label] = list({each.job: each for each in found}.values())
        elif not recorded:
            unknown.append(
                f"Contamination of {model.label} is not known: nothing records its training data. Name it with "
                "--training-data."
            )
    return replace(sweep, training=TrainingDataSearch(sweep, datasets, tuple(dict.fromkeys(unknown))))


def _recorded(model: EvaluatedModel) -> list[str]:
    """The datasets of a run and of those that it began from, in order; none for other models."""
    run = run_of(model.path)
    if run is None:
        return []
    configs = [link.config for link in lineage(run) if link.config]
    return list(dict.fromkeys(source.root for config in configs for source in config.data.all_sources))


def _opened(name: str, sweep: Sweep) -> TrainingDataset:
    """UserError if there is no dataset, or its samples are not decided yet."""
    training = open_dataset(name)
    config = read_recipe(training).score
    if read_entry(training, "decide", 0) is None:
        raise UserError(f"{training} is not built as far as `decide`. Run `sdtrain build` again.")
    further = TrainingJob(training, digest_of(sweep.following.texts), None) if sweep.following else None
    if not sweep.reference.places:
        note = "The reference is statistics, so nobody can tell which of its images occur in the training data."
        return TrainingDataset(TrainingJob(training, sweep.prompts.digest, None), further, (note,))
    notes, clip = list[str](), _network(training, config)
    if clip is None:
        notes.append(f"{training} has no embeddings of a trained CLIP, so images are not compared by embedding.")
    digest = clip_digest(clip.clip_model, clip.clip_weights) if clip else ""
    signatures = prepare_signatures(sweep.reference, clip, digest)
    return TrainingDataset(TrainingJob(training, sweep.prompts.digest, signatures), further, tuple(notes))


def _network(training: DatasetDir, config: ScoreConfig) -> ScoreConfig | None:
    """CLIP's settings if a dataset has embeddings that say anything."""
    shards = list(selected_shards(training))
    fetch_outputs(training, "score", shards[:1], tars=False)
    if not shards or config.clip_weights is None or is_stand_in(config):
        return None
    return config if "embedding" in pq.read_schema(training.scores(shards[0])).names else None


def _checked_clip(config: ScoreConfig) -> str:
    return clip_digest(config.clip_model, config.clip_weights)


def _method(datasets: Sequence[TrainingDataset], num_images: int) -> str:
    said = "prompts: captions of the same letters and digits, in lower case"
    if not num_images:
        return said
    clips = {job.clip.clip_model: job.clip_digest for each in datasets if (job := each.job.signatures) and job.clip}
    embedded = "".join(f", or a cosine of at least {THRESHOLD:g} by CLIP {name} ({clips[name]})" for name in clips)
    return (
        f"{said}; images: the same file's sha256, the same pixels, perceptual hashes that differ in at most {RADIUS} "
        f"of 64 bits with the same colours{embedded}"
    )


def _by_way(hits: Sequence[Hit], ways: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    return {way: np.unique(np.array([hit.item for hit in hits if hit.way == way], np.int64)) for way in ways}


def _union(by_way: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.unique(np.concatenate(list(by_way.values())))


def _occurrences(num: int, by_way: Mapping[str, NDArray[np.int64]]) -> Occurrences:
    return Occurrences(num=num, found=len(_union(by_way)), by={way: len(items) for way, items in by_way.items()})
