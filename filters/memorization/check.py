"""Comparison of samples with their nearest training images, to find memorised ones.

- **Near-duplicate** (`near-duplicate`): the cosine of SSCD's embeddings is at least 0.5, as in Somepalli et al. 2022,
  arXiv 2212.03860 (`filters.score.sscd`; the nearest images by CLIP are compared). Without SSCD's weights, that of
  CLIP's embeddings is at least `threshold`. This is a proxy: CLIP encodes an image's content, not whether it was
  copied, so images of one motif are also similar. The default is 0.95, the default of `duplicates.semantic_threshold`.
  `calibrate` measures the limit on the dataset's own images: the share of training images with another one so similar,
  and the share of random pairs.
- **The same image** (`same`): root mean square difference of pixels from 0 to 1 of at most 0.15, as Carlini et al. 2023
  (arXiv 2301.13188, section 4.1) define extraction from Stable Diffusion; and, because pale images meet that limit
  trivially, perceptual hashes that differ in at most `radius` bits. Both use the centre crop that training sees.

A sample is flagged if either holds for one of its neighbours; the same images come first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

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
from filters.search.hits import Hit, image_of
from filters.search.search import Search
from filters.search.sheet import Cell, Row, write_sheet
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from filters.score.sscd import SscdEncoder

SSCD_THRESHOLD = 0.5
"""Of Somepalli et al. 2022, for SSCD's cosines."""
KINDS = ("same", "near-duplicate", "new")
_AT_ONCE, _ROWS_SHOWN = 64, 24


@dataclass(frozen=True)
class Verdict:
    """A sample and its neighbours, same image first, then nearest first; `kind` is one of `KINDS`.

    `similarity` is the cosine of the nearest, by the network that decides; -1 without neighbours.
    """

    sample: Sample
    neighbours: Sequence[Neighbour]
    kind: str
    similarity: float

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
        limits = {"network": self.limits.network, "threshold": self.limits.cosine}
        limits |= {"radius": self.limits.radius, "pixels": MAX_PIXEL_DISTANCE}
        cosines = quantiles([verdict.similarity for verdict in self.verdicts])
        named = {"num_samples": len(self.verdicts), **kinds, "limits": limits, "cosines": cosines}
        return named | {"calibration": self.calibration.summary(), "notes": list(self.notes)}


def check_samples(
    search: Search, samples: Iterable[Sample], limits: Limits | None = None, sscd: SscdEncoder | None = None
) -> Memorised:
    """Searches the kept training images for samples, holding a few samples in memory at a time.

    With `sscd`, it decides on near-duplicates, at `limits.sscd_threshold` or 0.5. UserError if there are no samples, or
    the dataset cannot be searched.
    """
    limits = _for_network(limits or Limits(), sscd)
    verdicts = [verdict for part in _parts(samples) for verdict in _verdicts(search, part, limits, sscd)]
    if not verdicts:
        raise UserError("There are no samples to look for.")
    verdicts.sort(key=lambda verdict: (KINDS.index(verdict.kind), -verdict.similarity, verdict.sample.name))
    calibration = calibrate(search, limits, sscd)
    return Memorised(verdicts, calibration, limits, [*_notes(search, limits, sscd), calibration.sentence()])


def _for_network(limits: Limits, sscd: SscdEncoder | None) -> Limits:
    if sscd is None:
        return replace(limits, sscd_threshold=None)
    return replace(limits, sscd_threshold=SSCD_THRESHOLD if limits.sscd_threshold is None else limits.sscd_threshold)


def _parts(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while part := list(islice(rest, _AT_ONCE)):
        yield part


def _verdicts(search: Search, samples: Sequence[Sample], limits: Limits, sscd: SscdEncoder | None) -> Iterator[Verdict]:
    images = [sample.read() for sample in samples]
    found = search.by_images(images, limits.top, kept_only=True)
    for sample, image, hits in zip(samples, images, found, strict=True):
        neighbours = _compared(image, [(hit, image_of(search.dataset, hit)) for hit in hits], sscd)
        neighbours.sort(key=lambda neighbour: (not neighbour.is_same(limits), -neighbour.cosine(limits)))
        same = any(neighbour.is_same(limits) for neighbour in neighbours)
        similar = any(neighbour.is_near_duplicate(limits) for neighbour in neighbours)
        nearest = max((neighbour.cosine(limits) for neighbour in neighbours), default=-1.0)
        yield Verdict(sample, neighbours, "same" if same else "near-duplicate" if similar else "new", nearest)


def _compared(
    sample: Image.Image, found: Sequence[tuple[Hit, Image.Image | None]], sscd: SscdEncoder | None
) -> list[Neighbour]:
    neighbours = [compare(sample, hit, image) for hit, image in found]
    if sscd is None:
        return neighbours
    own = sscd.embed([sample])[0]
    cosines = [None if image is None else float(own @ sscd.embed([image])[0]) for _, image in found]
    return [replace(neighbour, sscd=cosine) for neighbour, cosine in zip(neighbours, cosines, strict=True)]


def _near_duplicate_note(limits: Limits, sscd: SscdEncoder | None) -> str:
    if sscd is None:
        return (
            f"Near-duplicate: the cosine of CLIP embeddings is at least {limits.cosine:g}; a proxy, since CLIP judges "
            "what is shown and not whether it was copied. --sscd compares with a network that does."
        )
    return (
        f"Near-duplicate: the cosine of SSCD embeddings is at least {limits.cosine:g} (Somepalli et al. 2022: "
        f"{SSCD_THRESHOLD:g}). Its weights are {sscd.digest[:12]}, and the {limits.top} nearest by CLIP are compared."
    )


def _notes(search: Search, limits: Limits, sscd: SscdEncoder | None) -> list[str]:
    notes = [
        _near_duplicate_note(limits, sscd),
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
        label = f"{found.limits.network}'s cosine with the nearest (other) training image"
        plot_histogram(groups, found.limits.cosine, label, drawn)
        drawn.replace(temporary)


def _row(found: Memorised, verdict: Verdict, dataset: DatasetDir) -> Row:
    named = verdict.sample.prompt or verdict.sample.name
    return Row(f"{verdict.kind}: {named}", list(_cells(found, verdict, named, dataset)))


def _cells(found: Memorised, verdict: Verdict, named: str, dataset: DatasetDir) -> Iterator[Cell]:
    yield Cell(verdict.sample.read(), "sample", named)
    for neighbour in verdict.neighbours:
        hit, head = neighbour.hit, f"{neighbour.cosine(found.limits):.3f}"
        if neighbour.hash_bits is not None:
            head += f", {neighbour.hash_bits} bits, px {neighbour.pixel_distance:.2f}"
        marked = neighbour.is_same(found.limits) or neighbour.is_near_duplicate(found.limits)
        yield Cell(image_of(dataset, hit), head, f"{hit.caption} ({hit.key})", marked)
