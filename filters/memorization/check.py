"""Comparison of samples with their nearest training images, to find memorised ones.

- **Near-duplicate** (`near-duplicate`): the cosine of CLIP's embeddings is at least `threshold`. This is a proxy:
  CLIP encodes an image's content, not whether it was copied, so images of one motif are also similar. The default is
  0.95, the default of `duplicates.semantic_threshold`. (Somepalli et al. 2022, arXiv 2212.03860, use 0.5 with SSCD, a
  copy-detection network; its cosines are not comparable to CLIP's.) `calibrate` measures the limit on the dataset's own
  images: the share of training images with another one so similar, and the share of random pairs.
- **The same image** (`same`): root mean square difference of pixels from 0 to 1 of at most 0.15, as Carlini et al. 2023
  (arXiv 2301.13188, section 4.1) define extraction from Stable Diffusion; and, because pale images meet that limit
  trivially, perceptual hashes that differ in at most `radius` bits. Both use the centre crop that training sees.

A sample is flagged if either holds for one of its neighbours; the same images come first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filters.memorization.samples import Sample
from filters.memorization.similarity import (
    MAX_PIXEL_DISTANCE,
    Calibration,
    Limits,
    Neighbour,
    calibrate,
    compare,
    quantiles,
)
from filters.search.hits import image_of
from filters.search.search import Search
from filters.search.sheet import Cell, Row, write_sheet
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError

KINDS = ("same", "near-duplicate", "new")
_AT_ONCE, _ROWS_SHOWN = 64, 24


@dataclass(frozen=True)
class Verdict:
    """A sample and its neighbours, same image first, then nearest first; `kind` is one of `KINDS`."""

    sample: Sample
    neighbours: Sequence[Neighbour]
    kind: str

    @property
    def similarity(self) -> float:
        """Cosine of the nearest."""
        return max((neighbour.hit.similarity for neighbour in self.neighbours), default=-1.0)

    def row(self) -> dict[str, Any]:
        """Returns a row for JSON."""
        named = {"sample": self.sample.name, "prompt": self.sample.prompt, "verdict": self.kind}
        return named | {"neighbours": [neighbour.row() for neighbour in self.neighbours]}


@dataclass(frozen=True)
class Memorised:
    """The verdicts on all samples: flagged ones first, then by similarity to a training image.

    `calibration` is the threshold's meaning in this dataset; `notes` are sentences needed to read the metrics.
    """

    verdicts: Sequence[Verdict]
    calibration: Calibration
    limits: Limits
    notes: Sequence[str]

    def count(self, kind: str) -> int:
        """Returns the number of samples of a kind."""
        return Counter(verdict.kind for verdict in self.verdicts)[kind]

    def document(self) -> dict[str, Any]:
        """Returns the summary with a row for each sample."""
        return self.summary() | {"samples": [verdict.row() for verdict in self.verdicts]}

    def summary(self) -> dict[str, Any]:
        """Returns counts, limits and cosine distributions for JSON."""
        kinds = {kind: self.count(kind) for kind in KINDS}
        limits = {"threshold": self.limits.threshold, "radius": self.limits.radius, "pixels": MAX_PIXEL_DISTANCE}
        cosines = quantiles([verdict.similarity for verdict in self.verdicts])
        named = {"num_samples": len(self.verdicts), **kinds, "limits": limits, "cosines": cosines}
        return named | {"calibration": self.calibration.summary(), "notes": list(self.notes)}


def check_samples(search: Search, samples: Iterable[Sample], limits: Limits | None = None) -> Memorised:
    """Searches the kept training images for samples, holding a few samples in memory at a time.

    UserError if there are no samples, or the dataset cannot be searched.
    """
    limits = limits or Limits()
    verdicts = [verdict for part in _parts(samples) for verdict in _verdicts(search, part, limits)]
    if not verdicts:
        raise UserError("There are no samples to look for.")
    verdicts.sort(key=lambda verdict: (KINDS.index(verdict.kind), -verdict.similarity, verdict.sample.name))
    calibration = calibrate(search, limits.threshold)
    return Memorised(verdicts, calibration, limits, [*_notes(search, limits), calibration.sentence()])


def _parts(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while part := list(islice(rest, _AT_ONCE)):
        yield part


def _verdicts(search: Search, samples: Sequence[Sample], limits: Limits) -> Iterator[Verdict]:
    images = [sample.read() for sample in samples]
    found = search.by_images(images, limits.top, kept_only=True)
    for sample, image, hits in zip(samples, images, found, strict=True):
        neighbours = [compare(image, hit, image_of(search.dataset, hit)) for hit in hits]
        same = [neighbour for neighbour in neighbours if neighbour.is_same(limits)]
        others = [neighbour for neighbour in neighbours if not neighbour.is_same(limits)]
        similar = any(neighbour.is_near_duplicate(limits) for neighbour in neighbours)
        yield Verdict(sample, same + others, "same" if same else "near-duplicate" if similar else "new")


def _notes(search: Search, limits: Limits) -> list[str]:
    notes = [
        f"Near-duplicate: the cosine of CLIP embeddings is at least {limits.threshold:g}; a proxy, since CLIP judges "
        "what is shown and not whether it was copied.",
        f"Same: perceptual hashes differ in at most {limits.radius} bits, and pixels by at most {MAX_PIXEL_DISTANCE} "
        "(root mean square of 0 to 1; Carlini et al. 2023).",
        "Compared with the images that were kept; dropped duplicates count through the one that stayed.",
    ]
    if search.is_stand_in:
        notes.append(
            "CLIP is a demo network with random weights here, to which all images are near: that a sample is "
            "near-duplicate says nothing. The pixel check holds."
        )
    if not search.is_exact:
        notes.append("The nearest lists of the index are compared and not all images, so a neighbour may be missed.")
    return notes


def write_memorised(found: Memorised, dataset: DatasetDir, folder: Path) -> list[Path]:
    """Writes the report, memorised.json, .png and .html and similarities.png into a folder; returns their paths.

    The sheets show at most the first 24 samples with their neighbours in `dataset`; the JSON has all.
    """
    paths = [folder / name for name in ("memorised.json", "memorised.png", "memorised.html", "similarities.png")]
    with publish(paths[0]) as temporary:
        temporary.write_text(json.dumps(found.document(), indent=1, ensure_ascii=False) + "\n")
    same, similar = found.count("same"), found.count("near-duplicate")
    title = f"{len(found.verdicts):,} samples: {same:,} same as a training image, {similar:,} near-duplicates"
    shown = [_row(found, verdict, dataset) for verdict in found.verdicts[:_ROWS_SHOWN]]
    for path in paths[1:3]:
        write_sheet(path, title, found.notes, shown)
    _plot(found, paths[3])
    return paths


def _plot(found: Memorised, path: Path) -> None:
    from sdtrain.report.plots import plot_histogram

    groups = {"training images": list(found.calibration.nearest), "samples": [v.similarity for v in found.verdicts]}
    with publish(path) as temporary:
        drawn = temporary.with_suffix(".png")  # matplotlib picks the format by suffix
        plot_histogram(groups, found.limits.threshold, "cosine with the nearest (other) training image", drawn)
        drawn.replace(temporary)


def _row(found: Memorised, verdict: Verdict, dataset: DatasetDir) -> Row:
    named = verdict.sample.prompt or verdict.sample.name
    return Row(f"{verdict.kind}: {named}", list(_cells(found, verdict, named, dataset)))


def _cells(found: Memorised, verdict: Verdict, named: str, dataset: DatasetDir) -> Iterator[Cell]:
    yield Cell(verdict.sample.read(), "sample", named)
    for neighbour in verdict.neighbours:
        hit, head = neighbour.hit, f"{neighbour.hit.similarity:.3f}"
        if neighbour.hash_bits is not None:
            head += f", {neighbour.hash_bits} bits, px {neighbour.pixel_distance:.2f}"
        marked = neighbour.is_same(found.limits) or neighbour.is_near_duplicate(found.limits)
        yield Cell(image_of(dataset, hit), head, f"{hit.caption} ({hit.key})", marked)
