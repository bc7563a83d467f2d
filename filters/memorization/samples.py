"""Images that a model drew: those of `sdtrain sample`, or those of an evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from filters.search.search import read_image, read_image_file
from sdtrain.dataset.tars import Member, index_samples
from sdtrain.errors import UserError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_SHEET = "grid"  # of `sdtrain sample --grid`
_PART = re.compile(r"[0-9]+\.tar")


@dataclass(frozen=True)
class Sample:
    """An image that a model drew. It is read when it is looked at, so that any number of samples can be checked.

    Attributes:
        name: its file, with the tar's before a colon.
        read: gives the image, RGB.
        prompt: empty where it is not known.
    """

    name: str
    read: Callable[[], Image.Image]
    prompt: str = ""


def read_samples(folder: Path) -> Iterator[Sample]:
    """The samples of a folder, from `sdtrain sample` or from an evaluation: samples/MODEL/SCALE, or all below it.

    Sheets are left out.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in _ENDINGS and p.stem != _SHEET)
    tars = sorted(path for path in folder.rglob("*.tar") if _PART.fullmatch(path.name))
    if not images and not tars:
        raise UserError(f"{folder} holds no images ({', '.join(_ENDINGS)}) and no tars of an evaluation.")
    for path in images:
        yield Sample(path.name, partial(read_image_file, path), _prompt_of(path))
    for tar in tars:
        yield from _samples_in(tar, tar.relative_to(folder).as_posix())


def _samples_in(tar: Path, name: str) -> Iterator[Sample]:
    for sample in index_samples(tar):
        for ending, member in sample.members.items():
            if f".{ending}" in _ENDINGS:
                text = sample.members.get("txt")
                prompt = _body(tar, text).decode("utf-8", "replace") if text else ""
                image = f"{name}:{sample.key}.{ending}"
                yield Sample(image, partial(_read_member, tar, member, image), prompt)


def _read_member(tar: Path, member: Member, name: str) -> Image.Image:
    return read_image(_body(tar, member), name)


def _body(tar: Path, member: Member) -> bytes:
    with tar.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _prompt_of(path: Path) -> str:
    """What `sdtrain sample` wrote into the image."""
    try:
        with Image.open(path) as image:
            made = json.loads(image.info["sdtrain"])
        return str(made["prompt"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
