"""Images that a model drew: by `sdtrain sample`, in an evaluation, or new ones for repeated captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from filters.search.search import read_image, read_image_file
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.dataset.tars import Member, index_samples
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from sdtrain.sampling.sampler import SampleSettings

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif")
_NO_SAMPLE = re.compile(r"grid(-\d+)?|\..*")
"""Stems of sheets of `sdtrain sample --grid`, and of hidden files."""
_PART = re.compile(r"[0-9]+\.tar")

# A model memorises the images of the most repeated prompts first.
_CAPTIONS = """
SELECT caption, count(*) AS num FROM ({images}) JOIN read_parquet($decisions) d USING (uid)
WHERE d.reason IS NULL AND trim(caption) != '' GROUP BY caption ORDER BY num DESC, caption LIMIT $num
"""


@dataclass(frozen=True)
class Sample:
    """A lazily read sample of a model, so that any number can be checked.

    `name` is its file, prefixed by the tar's and a colon; `read` returns the RGB image; `prompt` is empty if unknown.
    """

    name: str
    read: Callable[[], Image.Image]
    prompt: str = ""


def read_samples(folder: Path) -> Iterator[Sample]:
    """Yields a folder's samples, from `sdtrain sample` or an evaluation: samples/MODEL/SCALE or above.

    Sheets and hidden files are left out. UserError if there are no samples, or one cannot be read.
    """
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in _ENDINGS and not _NO_SAMPLE.fullmatch(p.stem))
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
    try:
        with Image.open(path) as image:
            made = json.loads(image.info["sdtrain"])
        return str(made["prompt"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def repeated_captions(dataset: DatasetDir, num: int) -> list[tuple[str, int]]:
    """Returns the most common captions of kept images, with counts; raises `UserError` if none are kept."""
    images = [path for shard in selected_shards(dataset) if (path := dataset.images_table(shard)).exists()]
    if not dataset.decisions.exists() or not images:
        raise UserError(f"{dataset.root} is not built as far as `decide`. Run `sdtrain build` again.")
    tables = TableColumns(dataset)
    scan = tables.scan(images, "images")
    tables.save()
    with connected() as connection:
        asked = {"decisions": str(dataset.decisions), "num": num, **scan.values}
        rows = connection.execute(_CAPTIONS.format(images=scan.sql), asked).fetchall()
    if not rows:
        raise UserError(f"{dataset.root} holds no captions of kept images.")
    return rows


def draw_samples(
    model: Path, prompts: Sequence[str], per_prompt: int, seed: int, folder: Path, settings: SampleSettings
) -> list[Sample]:
    """Draws missing images into a folder, like `sdtrain sample`; raises `UserError` without the model."""
    from sdtrain.formats.any_model import resolve_checkpoint
    from sdtrain.sampling.batch import Model, all_devices, draw_batches, make_jobs, split_batches
    from sdtrain.sampling.output_folder import SampleFolder, Writer

    jobs = make_jobs(prompts, seed, per_prompt)
    samples = SampleFolder(folder, Model(resolve_checkpoint(model)), settings).placed(jobs)
    pending = samples.pending(split_batches(jobs, settings))
    with Writer(samples) as writer:
        for job, image in draw_batches(samples.model, pending, settings, all_devices()):
            writer.save(job, image, flagged=False)
    paths = [(job, samples.path(job)) for job in jobs]
    return [Sample(path.name, partial(read_image_file, path), job.prompt) for job, path in paths]
