"""Images in a folder: each says what made it, and what is there need not be drawn again."""

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
    """The folder.

    Attributes:
        folder: where the images are, each named by its seed.
        model: what they are drawn with.
        settings: how.
        judge: name of the safety checker that sees them first, if one does.
        flagged: what becomes of those that it flags: a black image, or a note beside where the image would be.
    """

    folder: Path
    model: Model
    settings: SampleSettings
    judge: str | None = None
    flagged: Flagged = "black"

    def path(self, job: Job) -> Path:
        """Where a job's image is, or will be."""
        return self.folder / f"{job.seed:05d}.png"

    def has(self, job: Job) -> bool:
        """Whether the image is there, is younger than the model, and says that it was made and judged as now."""
        wanted = description(job, self.model, self.settings)
        if self._made(self._refusal(job)) == wanted | self._judged(True):
            return self.flagged == "refuse"
        made = self._made(self.path(job))
        return made == wanted | self._judged(False) or (self.flagged == "black" and made == wanted | self._judged(True))

    def _made(self, path: Path) -> dict[str, Any] | None:
        """What an image or a note says of itself; None if there is none, or if it is older than the model."""
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
        save_image(self.path(job), image, job, self.model, self.settings, self._judged(flagged))

    def refuse(self, job: Job) -> None:
        """Notes that a job's image was drawn and is not to be shown; one that an earlier run left is deleted."""
        self.path(job).unlink(missing_ok=True)
        with publish(self._refusal(job)) as temporary:
            temporary.write_text(json.dumps(description(job, self.model, self.settings) | self._judged(True)) + "\n")

    def _judged(self, flagged: bool) -> dict[str, Any]:
        return ({"safety_checker": self.judge} if self.judge else {}) | ({"flagged": True} if flagged else {})

    def pending(self, batches: Sequence[Sequence[Job]]) -> list[Sequence[Job]]:
        """The batches of which an image is missing: whole ones, so that all images are those of one run."""
        return [batch for batch in batches if not all(self.has(job) for job in batch)]

    def write_sheet(self, jobs: Sequence[Job], columns: int | None) -> Path:
        """All images that are there, row by row.

        Raises:
            UserError: there is none.
        """
        images = []
        for job in jobs:
            if self.path(job).exists():  # a refused one is not
                with Image.open(self.path(job)) as image:
                    images.append(image.convert("RGB"))
        with publish(self.folder / SHEET) as temporary:
            make_grid(images, columns).save(temporary, "PNG")
        return self.folder / SHEET


class Writer:
    """Writes images in threads, because compressing one takes about as long as drawing a good part of it on a GPU."""

    def __init__(self, sample_folder: SampleFolder):
        self._folder, self._pool = sample_folder, ThreadPoolExecutor(_NUM_THREADS)
        self._waiting: list[Future[None]] = []

    def save(self, job: Job, image: Image.Image, flagged: bool) -> Path:
        """Begins to write; waits where too many are waiting. An error of an earlier one is raised here."""
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
