"""Do samples repeat pictures of the training data? For each sample, its nearest training pictures.

Two questions, and what answers them:

- **Is it alike?** The cosine of CLIP's embeddings is at least `threshold`. This is a proxy: CLIP tells what a picture
  shows and not whether it was copied, so pictures of one motif are near each other too. By default the limit is 0.95,
  which is where `duplicates.semantic_threshold` begins to call training pictures copies of one another. (Somepalli et
  al. 2022, arXiv 2212.03860, use SSCD, a network made to detect copies, and 0.5; its cosines and CLIP's cannot be
  compared.) Whether a cosine is unusual is seen beside those of training pictures and their own nearest neighbours.
- **Is it the same picture?** Root mean square difference of pixels from 0 to 1 of at most 0.15, as Carlini et al. 2023
  (arXiv 2301.13188, section 4.1) define extraction from Stable Diffusion; and, because pale pictures are near each
  other by that alone, perceptual hashes that differ in at most `radius` bits. Both are of the centre crop that training
  sees.

A sample is flagged if either holds for one of its neighbours; the same pictures come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from filters.inputs import perceptual_hash
from filters.search.hits import Hit, picture_of
from filters.search.search import Search, read_picture_file
from filters.search.sheet import Cell, Row, write_sheet
from sdtrain.data.files import publish
from sdtrain.data.steps import told
from sdtrain.errors import UserError

MAX_PIXEL_DISTANCE = 0.15
_COMPARED_PX = 256
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_AT_ONCE, _REFERENCES, _ROWS_SHOWN = 64, 256, 24
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Limits:
    """What counts as memorised.

    Attributes:
        threshold: least cosine of CLIP's embeddings that is flagged.
        radius: bits in which the perceptual hashes of one picture may differ.
        top: neighbours that are looked at.
    """

    threshold: float = 0.95
    radius: int = 10
    top: int = 4


@dataclass(frozen=True)
class Sample:
    """A picture that a model drew, RGB."""

    name: str
    picture: Image.Image
    prompt: str = ""


@dataclass(frozen=True)
class Neighbour:
    """A training picture near a sample.

    Attributes:
        hash_bits: in which the perceptual hashes differ; None where the picture is lost.
        pixel_distance: root mean square, of channels from 0 to 1; likewise.
    """

    hit: Hit
    picture: Image.Image | None
    hash_bits: int | None
    pixel_distance: float | None

    def is_same(self, limits: Limits) -> bool:
        """Whether it is the sample itself, to the pixel check."""
        if self.hash_bits is None or self.pixel_distance is None:
            return False
        return self.hash_bits <= limits.radius and self.pixel_distance <= MAX_PIXEL_DISTANCE

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return self.hit.row() | {"hash_bits": self.hash_bits, "pixel_distance": self.pixel_distance}


@dataclass(frozen=True)
class Verdict:
    """A sample and its neighbours, nearest first; `kind` is "same", "alike" or "new"."""

    sample: Sample
    neighbours: Sequence[Neighbour]
    kind: str

    @property
    def nearness(self) -> float:
        """Cosine of the nearest."""
        return self.neighbours[0].hit.nearness if self.neighbours else -1.0


@dataclass(frozen=True)
class Memorised:
    """What came of all samples: the flagged first, those nearest to a training picture before others.

    Attributes:
        references: cosines of some training pictures and their own nearest other ones.
        notes: what one must know to read the figures, as sentences.
    """

    verdicts: Sequence[Verdict]
    references: Sequence[float]
    limits: Limits
    notes: Sequence[str]

    @property
    def num_flagged(self) -> int:
        """Samples that are not new."""
        return sum(verdict.kind != "new" for verdict in self.verdicts)

    def summary(self) -> dict[str, Any]:
        """For JSON: counts, limits, and both distributions of cosines."""
        kinds = {kind: sum(verdict.kind == kind for verdict in self.verdicts) for kind in ("same", "alike", "new")}
        limits = {"threshold": self.limits.threshold, "radius": self.limits.radius, "pixels": MAX_PIXEL_DISTANCE}
        cosines = {
            "samples": _quantiles([verdict.nearness for verdict in self.verdicts]),
            "training_pictures": _quantiles(self.references),
        }
        return {"num_samples": len(self.verdicts), **kinds, "limits": limits, "cosines": cosines, "notes": self.notes}


def check_samples(search: Search, samples: Sequence[Sample], limits: Limits | None = None) -> Memorised:
    """Looks for samples in the training data: the pictures that were kept.

    Raises:
        UserError: there are no samples, or the dataset cannot be searched.
    """
    if not samples:
        raise UserError("There are no samples to look for.")
    limits = limits or Limits()
    starts = range(0, len(samples), _AT_ONCE)
    parts = (samples[start : start + _AT_ONCE] for start in starts)
    verdicts = [
        verdict
        for part in told(parts, "memorised: samples", len(samples), "samples", len)
        for verdict in _verdicts(search, part, limits)
    ]
    order = {"same": 0, "alike": 1, "new": 2}
    verdicts.sort(key=lambda verdict: (order[verdict.kind], -verdict.nearness, verdict.sample.name))
    return Memorised(verdicts, _references(search), limits, _notes(search, limits))


def read_samples(folder: Path) -> list[Sample]:
    """The pictures of a folder, with the prompts that `sdtrain sample` wrote into them; its sheets are left out.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in _ENDINGS and p.stem != "grid")
    if not paths:
        raise UserError(f"{folder} holds no pictures ({', '.join(_ENDINGS)}). Draw some with `sdtrain sample`.")
    return [Sample(path.name, read_picture_file(path), _prompt_of(path)) for path in paths]


def write_memorised(found: Memorised, folder: Path) -> list[Path]:
    """Writes memorised.json, .png and .html and similarities.png into a folder; returns their paths.

    The pictures show the first samples, at most 24; the JSON has all.
    """
    from sdtrain.report.plots import plot_histogram

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("memorised.json", "memorised.png", "memorised.html", "similarities.png")]
    with publish(paths[0]) as temporary:
        rows = [_row(verdict) for verdict in found.verdicts]
        temporary.write_text(json.dumps(found.summary() | {"samples": rows}, indent=1, ensure_ascii=False) + "\n")
    counts = found.summary()
    title = f"{len(found.verdicts):,} samples: {counts['same']} same as a training picture, {counts['alike']} alike"
    shown = [Row(_title(verdict), list(_cells(verdict, found.limits))) for verdict in found.verdicts[:_ROWS_SHOWN]]
    for path in paths[1:3]:
        write_sheet(path, title, found.notes, shown)
    groups = {"training pictures": list(found.references), "samples": [v.nearness for v in found.verdicts]}
    with publish(paths[3]) as temporary:
        drawn = temporary.with_suffix(".png")  # matplotlib goes by the ending
        plot_histogram(groups, found.limits.threshold, "cosine with the nearest (other) training picture", drawn)
        drawn.replace(temporary)
    return paths


def _verdicts(search: Search, samples: Sequence[Sample], limits: Limits) -> Iterator[Verdict]:
    found = search.by_pictures([sample.picture for sample in samples], limits.top, kept_only=True)
    for sample, hits in zip(samples, found, strict=True):
        neighbours = [_compared(sample.picture, hit, picture_of(search.dataset, hit)) for hit in hits]
        same = [neighbour for neighbour in neighbours if neighbour.is_same(limits)]
        others = [neighbour for neighbour in neighbours if not neighbour.is_same(limits)]
        alike = any(neighbour.hit.nearness >= limits.threshold for neighbour in neighbours)
        yield Verdict(sample, same + others, "same" if same else "alike" if alike else "new")


def _compared(sample: Image.Image, hit: Hit, picture: Image.Image | None) -> Neighbour:
    if picture is None:
        return Neighbour(hit, None, None, None)
    one, other = _crop(sample), _crop(picture)
    bits = (perceptual_hash(one) ^ perceptual_hash(other)) & (2**64 - 1)
    difference = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
    distance = float(np.sqrt(np.mean(difference**2)))
    return Neighbour(hit, picture, bits.bit_count(), round(distance, 4))


def _crop(picture: Image.Image) -> Image.Image:
    return ImageOps.fit(picture, (_COMPARED_PX, _COMPARED_PX), Image.Resampling.BICUBIC)


def _references(search: Search) -> list[float]:
    """Cosines of some kept pictures, evenly chosen, and their nearest other kept ones."""
    vectors = search.some_vectors(_REFERENCES)
    return [hits[1].nearness for hits in search.nearest(vectors, 2, kept_only=True) if len(hits) > 1]


def _notes(search: Search, limits: Limits) -> list[str]:
    notes = [
        f"Alike: the cosine of CLIP embeddings is at least {limits.threshold:g}; a proxy, since CLIP judges what is "
        "shown and not whether it was copied.",
        f"Same: perceptual hashes differ in at most {limits.radius} bits, and pixels by at most {MAX_PIXEL_DISTANCE} "
        "(root mean square of 0 to 1; Carlini et al. 2023).",
        "Compared with the pictures that were kept; dropped copies count through the one that stayed.",
    ]
    if search.is_stand_in:
        notes.append("CLIP is a demo network with random weights here: its cosines mean little, the pixel check holds.")
    if not search.is_exact:
        notes.append("The nearest lists of the index are compared and not all pictures, so a neighbour may be missed.")
    return notes


def _prompt_of(path: Path) -> str:
    with Image.open(path) as picture:
        text = picture.info.get("sdtrain")
    try:
        made = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        made = {}
    return str(made.get("prompt", "")) if isinstance(made, dict) else ""


def _row(verdict: Verdict) -> dict[str, Any]:
    named = {"sample": verdict.sample.name, "prompt": verdict.sample.prompt, "verdict": verdict.kind}
    return named | {"neighbours": [neighbour.row() for neighbour in verdict.neighbours]}


def _title(verdict: Verdict) -> str:
    return f"{verdict.kind}: {verdict.sample.prompt or verdict.sample.name}"


def _cells(verdict: Verdict, limits: Limits) -> Iterator[Cell]:
    yield Cell(verdict.sample.picture, "sample", verdict.sample.prompt or verdict.sample.name)
    for neighbour in verdict.neighbours:
        hit = neighbour.hit
        pixels = (
            "" if neighbour.hash_bits is None else f", {neighbour.hash_bits} bits, px {neighbour.pixel_distance:.2f}"
        )
        marked = neighbour.is_same(limits) or hit.nearness >= limits.threshold
        yield Cell(neighbour.picture, f"{hit.nearness:.3f}{pixels}", f"{hit.caption} ({hit.key})", marked)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found: NDArray[np.float64] = np.quantile(np.asarray(values, np.float64), _QUANTILES) if len(values) else np.zeros(0)
    return {f"{share:.0%}": round(float(value), 4) for share, value in zip(_QUANTILES, found, strict=False)}
