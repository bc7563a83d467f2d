"""A folder of sampled images with records of their making, so that finished ones are not drawn again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from sdtrain.dataset.files import publish
from sdtrain.sampling.batch import Job, Model, description, save_image
from sdtrain.sampling.safety import Flagged
from sdtrain.sampling.sampler import SampleSettings, make_grid

_NUM_THREADS, _MAX_WAITING = 4, 64
SHEET = "grid.png"


@dataclass(frozen=True)
class SampleFolder:
    """A folder of sampled images, each named by its seed.

    An image flagged by `safety_checker` (a name, or None) is replaced by a black one or by a note.
    """

    folder: Path
    model: Model
    settings: SampleSettings
    safety_checker: str | None = None
    flagged: Flagged = "black"

    def path(self, job: Job) -> Path:
        """Path of a job's image, whether or not it exists."""
        return self.folder / f"{job.seed:05d}.png"

    def has(self, job: Job) -> bool:
        """Whether the image exists, is newer than the model, and was made and checked with the same settings."""
        if self._made(self._refusal(job)) == self._record(job, flagged=True):
            return self.flagged == "refuse"
        accepted = [self._record(job, flagged) for flagged in ([False, True] if self.flagged == "black" else [False])]
        return self._made(self.path(job)) in accepted

    def _made(self, path: Path) -> dict[str, Any] | None:
        """The record in an image or a note; None if it is missing or older than the model."""
        try:
            if path.stat().st_mtime < self._model_changed:
                return None
            if path.suffix == ".json":
                return dict(json.loads(path.read_text()))
            with Image.open(path) as image:
                return dict(json.loads(image.text["sdtrain"]))  # type: ignore[attr-defined]
        except (OSError, KeyError, ValueError, AttributeError, TypeError):
            return None

    def _refusal(self, job: Job) -> Path:
        return self.path(job).with_suffix(".refused.json")

    @cached_property
    def _model_changed(self) -> float:
        """When the model's files were last written; another may have been exported under the same name."""
        path = self.model.path
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def save(self, job: Job, image: Image.Image, flagged: bool = False) -> None:
        """Writes a job's image."""
        self._refusal(job).unlink(missing_ok=True)
        save_image(self.path(job), image, job, self.model, self.settings, self._verdict(flagged))

    def refuse(self, job: Job) -> None:
        """Notes that a job's image was flagged, and deletes that of an earlier run."""
        self.path(job).unlink(missing_ok=True)
        with publish(self._refusal(job)) as temporary:
            temporary.write_text(json.dumps(self._record(job, flagged=True)) + "\n")

    def _record(self, job: Job, flagged: bool) -> dict[str, Any]:
        return description(job, self.model, self.settings) | self._verdict(flagged)

    def _verdict(self, flagged: bool) -> dict[str, Any]:
        checker = {"safety_checker": self.safety_checker} if self.safety_checker else {}
        return checker | ({"flagged": True} if flagged else {})

    def pending(self, batches: Sequence[Sequence[Job]]) -> list[Sequence[Job]]:
        """The batches that lack an image; drawn whole, so that a batch's images are of one run."""
        return [batch for batch in batches if not all(self.has(job) for job in batch)]

    def write_sheet(self, jobs: Sequence[Job], columns: int | None) -> Path:
        """Writes all existing images to a sheet, row by row; UserError if there are none."""
        images = []
        for job in jobs:
            if self.path(job).exists():  # refused images do not
                with Image.open(self.path(job)) as image:
                    images.append(image.convert("RGB"))
        with publish(self.folder / SHEET) as temporary:
            make_grid(images, columns).save(temporary, "PNG")
        return self.folder / SHEET


class Writer:
    """Writes images in threads, because PNG compression takes a good part of a GPU's drawing time."""

    def __init__(self, sample_folder: SampleFolder):
        self._folder, self._pool = sample_folder, ThreadPoolExecutor(_NUM_THREADS)
        self._waiting: list[Future[None]] = []

    def save(self, job: Job, image: Image.Image, flagged: bool) -> Path:
        """Queues an image, waiting while the queue is full; raises the errors of earlier ones."""
        self._waiting.append(self._pool.submit(self._folder.save, job, image, flagged))
        while len(self._waiting) > _MAX_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.pop(0).result()
        return self._folder.path(job)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        for written in self._waiting if error is None else ():
            written.result()
