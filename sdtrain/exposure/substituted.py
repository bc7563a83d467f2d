"""Corrects planned uses by what training put in the place of damaged samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdtrain.exposure.shard_rows import Ints
from sdtrain.loading.sample_plan import SamplePlan
from sdtrain.loading.substitutes import Substitutes


@dataclass(frozen=True)
class Drawn:
    """Uses of samples, one array each: their places among the samples in question, steps, positions and epochs."""

    places: Ints
    steps: Ints
    positions: Ints
    epochs: Ints


def drawn_by(plan: SamplePlan, numbers: Ints, num_steps: int, batch: int) -> Drawn:
    """The uses of samples with those numbers that the plan has; none of numbers that it does not draw."""
    (places,) = np.nonzero((numbers >= 0) & (numbers < plan.size))
    found = plan.find(numbers[places], num_steps * batch)
    return Drawn(places[found.rows], *np.divmod(found.positions, batch), found.epochs)


def as_trained(
    drawn: Drawn, numbers: Ints, plan: SamplePlan, num_steps: int, batch: int, substitutes: Substitutes
) -> Drawn:
    """The uses without those in which a sample was damaged, and with those in which it took another's place."""
    rows = substitutes.rows[(substitutes.rows[:, 0] < num_steps) & (substitutes.rows[:, 1] < plan.size)]
    if not len(rows):
        return drawn
    planned, replaced = _each_once(np.stack([drawn.steps, numbers[drawn.places], drawn.epochs], axis=1), rows[:, :3])
    kept = ~np.isin(planned, replaced)

    rows = rows[np.isin(rows[:, 3], numbers)]
    damaged = np.unique(rows[:, 1])
    there = drawn_by(plan, damaged, num_steps, batch)
    positions, wanted = _each_once(np.stack([there.steps, damaged[there.places], there.epochs], axis=1), rows[:, :3])
    order = np.argsort(positions)
    at = order[np.searchsorted(positions, wanted, sorter=order)] if len(rows) else np.empty(0, np.int64)
    by_number = np.argsort(numbers)
    places = by_number[np.searchsorted(numbers, rows[:, 3], sorter=by_number)]
    taken = Drawn(places, rows[:, 0], there.positions[at], rows[:, 2])
    return Drawn(*(np.concatenate([getattr(drawn, name)[kept], getattr(taken, name)]) for name in vars(drawn)))


def _each_once(first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """A number for each row of two tables, the same for the same row."""
    numbers = np.unique(np.concatenate([first, second]), axis=0, return_inverse=True)[1].reshape(-1)
    return numbers[: len(first)], numbers[len(first) :]
