"""The prompts of an evaluation: a seeded choice from a text file or from COCO's captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from sdtrain.errors import UserError
from sdtrain.sampling.prompts import read_prompts


@dataclass(frozen=True)
class Prompts:
    """The chosen prompts in the order of drawing; `source` describes file and choice."""

    texts: tuple[str, ...]
    source: str

    @property
    def digest(self) -> str:
        """Hex sha256 of the prompts, in order."""
        return digest_of(self.texts)


class _Annotation(BaseModel):
    image_id: int
    id: int
    caption: str


class _Captions(BaseModel):
    annotations: list[_Annotation]


def digest_of(texts: Sequence[str]) -> str:
    """Hex sha256 of texts, in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def choose_prompts(path: Path, num: int, seed: int) -> Prompts:
    """The first `num` of all prompts in the seed's order, so a larger number extends a smaller one.

    Text files and tables are those of `read_prompts`. COCO's captions (e.g. `captions_val2017.json`) give one caption
    per image, and second ones only after every image has given its first. UserError if the file is unreadable or
    has fewer prompts.
    """
    rng = np.random.default_rng(seed)
    if path.suffix == ".json":
        texts, num_images = _coco_captions(path, rng)
        most = -(-num // num_images)
        source = f"{path.name}: COCO captions of {num_images:,} images, at most {most} an image, seed {seed}"
    else:
        lines = read_prompts(path)
        texts = [lines[place] for place in rng.permutation(len(lines))]
        source = f"{path.name}: {len(lines):,} prompts, seed {seed}"
    if len(texts) < num:
        raise UserError(f"{path} has {len(texts):,} prompts, too few for {num:,}. Lower --num, or bring another file.")
    return Prompts(tuple(texts[:num]), source)


def _coco_captions(path: Path, rng: np.random.Generator) -> tuple[list[str], int]:
    """All captions (each image's first, then each image's second, ...) and the number of images."""
    try:
        found = _Captions.model_validate_json(path.read_bytes()).annotations
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path} is not a file of COCO captions: it needs `annotations` with image_id, id and caption "
            "(captions_val2017.json of annotations_trainval2017.zip)."
        ) from error
    by_image: dict[int, list[tuple[int, str]]] = {}
    for annotation in found:
        if caption := " ".join(annotation.caption.split()):
            by_image.setdefault(annotation.image_id, []).append((annotation.id, caption))
    if not by_image:
        raise UserError(f"{path} holds no caption.")
    images = sorted(by_image)
    orders = {image: rng.permutation(len(by_image[image])) for image in images}
    texts: list[str] = []
    for turn in range(max(map(len, by_image.values()))):
        having = [image for image in images if len(by_image[image]) > turn]
        shuffled = [having[place] for place in rng.permutation(len(having))]
        texts += [sorted(by_image[image])[orders[image][turn]][1] for image in shuffled]
    return texts, len(images)
