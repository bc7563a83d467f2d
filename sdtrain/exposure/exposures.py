"""Finds every use of samples in the steps behind a model, by inverting the plans of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdtrain.exposure.located import ABSENT, LOCATED, UNKNOWN, Locate, sample_numbers, untraced
from sdtrain.exposure.shard_rows import Ints
from sdtrain.exposure.substituted import as_trained, drawn_by
from sdtrain.exposure.trained import Checkpoint, Opened, Trained, at_hand, last_clean_checkpoint, trained_steps
from sdtrain.loading.sample_plan import sample_noise

KEPT, DROPPED, NOT_KNOWN = 0, 1, -1
"""What became of a caption; not known for a removed sample whose uid was not given."""


@dataclass(frozen=True)
class Uses:
    """Uses of samples in order of sample, run and step, one array each.

    Attributes:
        samples: row in `Exposures.samples`.
        places: row in `Exposures.located`.
        runs: number of the run in the chain.
        steps: optimizer step, from 0, as `sdtrain batch` counts.
        positions: in the step's global batch.
        epochs: how often the run had seen the sample before.
        captions: KEPT, DROPPED or NOT_KNOWN.
    """

    samples: Ints
    places: Ints
    runs: Ints
    steps: Ints
    positions: Ints
    epochs: Ints
    captions: Ints

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class Exposures:
    """The uses of some samples in a chain of runs.

    Attributes:
        chain: the runs, from the first to the one in question.
        located: the samples found in the datasets of each run, as rows of LOCATED.
        samples: the same, each sample once.
        uses: all of their uses.
        remarks: what could not be known, in sentences; without any, the answer is complete.
    """

    chain: Sequence[Trained]
    located: pa.Table
    samples: pa.Table
    uses: Uses
    remarks: Sequence[str]

    @property
    def num_used(self) -> int:
        """Samples used at least once."""
        return len(np.unique(self.uses.samples))

    def first(self, rows: Ints | None = None) -> tuple[int, int] | None:
        """The run's number and the step of the first use of any sample, or of some uses; None if there is none."""
        runs, steps = (array if rows is None else array[rows] for array in (self.uses.runs, self.uses.steps))
        if not len(runs):
            return None
        first = np.lexsort((steps, runs))[0]
        return int(runs[first]), int(steps[first])

    def clean_checkpoint(self, first: tuple[int, int]) -> Checkpoint | None:
        """The newest checkpoint at hand from before a use; None if there is none."""
        return last_clean_checkpoint(list(self.chain), *first)

    def of_each(self) -> Iterator[tuple[int, Ints]]:
        """Each sample's row, and its uses."""
        ends = np.searchsorted(self.uses.samples, np.arange(len(self.samples) + 1))
        for row in range(len(self.samples)):
            yield row, np.arange(ends[row], ends[row + 1])


def find_exposures(run: Path, locate: Locate, opened: Opened = at_hand) -> Exposures:
    """All uses, by the run and those that it descends from, of the samples that `locate` finds in their datasets.

    UserError if `run` is no run, or a record is damaged.
    """
    chain, remarks = trained_steps(run, opened)
    tables, found = [LOCATED.empty_table()], [_no_uses()]
    for number, trained in enumerate(chain):
        remarks += trained.remarks
        for source in range(len(trained.record.sources) if trained.record else 0):
            table, uses, limits = _in_source(trained, source, locate)
            found.append(replace(uses, places=uses.places + sum(map(len, tables)), runs=uses.runs + number))
            tables.append(table)
            remarks += limits
    located = pa.concat_tables(tables)
    samples, sample_of = _each_once(located)
    return Exposures(chain, located, samples, _joined(found, sample_of), list(dict.fromkeys(remarks)))


def _in_source(trained: Trained, source: int, locate: Locate) -> tuple[pa.Table, Uses, list[str]]:
    """The samples located in one dataset of a run, their uses, and what cannot be known of them."""
    record, dataset = trained.record, trained.datasets[source]
    if record is None:
        raise AssertionError("there is no record of the run's samples")
    if not dataset.root.is_dir():
        return LOCATED.empty_table(), _no_uses(), [f"{dataset}, on which {trained.run} was trained, is not there."]
    located = locate(dataset, record.stage)
    numbers, plan = sample_numbers(record, source, dataset, located), record.plan(trained.config)
    span = trained.num_steps, trained.config.global_batch_size
    drawn = as_trained(drawn_by(plan, numbers, *span), numbers, plan, *span, trained.substitutes)
    captions, nothing = _captions(trained, located, drawn.places, drawn.steps), np.zeros_like(drawn.steps)
    uses = Uses(nothing, drawn.places, nothing, drawn.steps, drawn.positions, drawn.epochs, captions)
    return located, uses, _limits(trained, source, numbers, plan.size)


def _limits(trained: Trained, source: int, numbers: Ints, plan_size: int) -> list[str]:
    record, dataset, said = trained.record, trained.datasets[source], []
    if num := int((numbers >= plan_size).sum()):
        said.append(f"{trained.run} held {num:,} of the samples out for validation: no step learned from them.")
    if record is None or (len(numbers) and not np.isin(numbers, (UNKNOWN, ABSENT)).any()):
        return said
    if num := untraced(record, source, dataset):
        said.append(
            f"{num:,} of the {len(record.sources[source].tables):,} shards of {dataset} that {trained.run} read were "
            "made again or changed since without a record: whether they held the samples cannot be known."
        )
    return said


def _captions(trained: Trained, located: pa.Table, places: Ints, steps: Ints) -> Ints:
    """What became of the caption in each use: the draw depends on seed, step and uid alone."""
    config = trained.config
    if not config.caption_dropout:
        return np.full(len(places), KEPT)
    uids, num_timesteps = located["uid"].to_pylist(), config.diffusion.num_timesteps

    def caption(place: int, step: int) -> int:
        if (uid := uids[place]) is None:
            return NOT_KNOWN
        drop = sample_noise(config.seed, step, uid, num_timesteps, (4, 1, 1)).drop
        return DROPPED if drop < config.caption_dropout else KEPT

    each = [caption(place, step) for place, step in zip(places.tolist(), steps.tolist(), strict=True)]
    return np.array(each, np.int64)


def _each_once(rows: pa.Table) -> tuple[pa.Table, Ints]:
    """The located samples without repetition, and the place there of each row; as present rather than removed."""
    if not len(rows):
        return rows, np.empty(0, np.int64)
    keys = rows["key"].combine_chunks().dictionary_encode()
    places, is_known = keys.indices.to_numpy(), pc.is_valid(rows["uid"]).to_numpy()
    chosen = np.lexsort((~is_known, places))  # of equal ones the first whose uid is known
    firsts = chosen[np.unique(places[chosen], return_index=True)[1]]
    return rows.take(firsts), places.astype(np.int64)


def _no_uses() -> Uses:
    return Uses(*np.empty((7, 0), np.int64))


def _joined(found: Sequence[Uses], sample_of: Ints) -> Uses:
    arrays = {name: np.concatenate([getattr(uses, name) for uses in found]) for name in Uses.__dataclass_fields__}
    arrays["samples"] = sample_of[arrays["places"]]
    order = np.lexsort((arrays["steps"], arrays["runs"], arrays["samples"]))
    return Uses(**{name: array[order] for name, array in arrays.items()})
