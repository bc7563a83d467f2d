"""A folder of sampled images with records of their making, so that finished ones are not drawn again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtrain.dataset.files import publish
from sdtrain.sampling.batch import RECORD, Job, Model, Sign, description, save_image, write_png
from sdtrain.sampling.credentials import Credentials, Origin, is_signed
from sdtrain.sampling.safety import Flagged
from sdtrain.sampling.sampler import SampleSettings, make_grid

_NUM_THREADS, _MAX_WAITING = 4, 64
SHEET = "grid.png"
_SHEET_OF = "sdtrain-sheet"
_VERDICT = ("safety_checker", "flagged")


@dataclass(frozen=True)
class SampleFolder:
    """A folder of sampled images, in which no image takes the place of another one.

    An image flagged by `safety_checker` (a name, or None) is replaced by a black one or by a note. `numbers` are those
    of files that are not named by their jobs; see `placed`. `credentials` sign every image and sheet.
    """

    folder: Path
    model: Model
    settings: SampleSettings
    safety_checker: str | None = None
    flagged: Flagged = "black"
    numbers: Mapping[Job, int] = field(default_factory=dict)
    credentials: Credentials | None = None

    def placed(self, jobs: Sequence[Job]) -> SampleFolder:
        """The same folder, with a number for each job that no other image has.

        A job whose image is there, from an earlier start of the same command, has that image's number. The others
        have their own, unless one of all these is that of another image: then they are counted on from the last of
        those. Other ranks, which may have drawn some of the jobs meanwhile, find the same numbers.
        """
        own, taken = self._found(jobs)
        missing, used = [job for job in jobs if job not in own], {*taken, *own.values()}
        numbers = [_own_number(job) for job in missing]
        if not taken.isdisjoint(map(_own_number, jobs)) or not used.isdisjoint(numbers):
            unused = (number for number in itertools.count(max(taken, default=-1) + 1) if number not in used)
            numbers = list(itertools.islice(unused, len(missing)))
        return replace(self, numbers=own | dict(zip(missing, numbers, strict=True)))

    def _found(self, jobs: Sequence[Job]) -> tuple[dict[Job, int], set[int]]:
        """Numbers of the jobs' images or refusals that are there, and those of all other images."""
        wanted = {_without_verdict(self._record(job, flagged=False)): job for job in jobs}
        own, taken = dict[Job, int](), set[int]()
        for path in sorted(itertools.chain(self.folder.glob("[0-9]*.png"), self.folder.glob("[0-9]*.refused.json"))):
            number, made = path.name.partition(".")[0], self._made(path)
            if made is None or not number.isdecimal():
                continue
            job = wanted.get(_without_verdict(made))
            if job is None or own.setdefault(job, int(number)) != int(number):
                taken.add(int(number))
        return own, taken

    def path(self, job: Job) -> Path:
        """Path of a job's image, whether or not it exists."""
        return self.folder / f"{self.numbers.get(job, _own_number(job)):05d}.png"

    def has(self, job: Job) -> bool:
        """Whether the image exists, is newer than the model, and was made and checked with the same settings."""
        if self._made(self._refusal(job)) == self._record(job, flagged=True):
            return self.flagged == "refuse"
        accepted = [self._record(job, flagged) for flagged in ([False, True] if self.flagged == "black" else [False])]
        return self._made(self.path(job)) in accepted and _is_whole(self.path(job), self.credentials is not None)

    def _made(self, path: Path) -> dict[str, Any] | None:
        """The record in an image or a note, empty if it has none or is older than the model; None if unreadable."""
        try:
            if path.suffix == ".json":
                made = dict(json.loads(path.read_text()))
            else:
                with Image.open(path) as image:
                    made = dict(json.loads(image.info.get(RECORD, "{}")))
            return made if path.stat().st_mtime >= self._model_changed else {}
        except (OSError, ValueError, TypeError, SyntaxError):
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
        path = self.path(job)
        sign = self._signing(Origin(path.name, job.prompt, self.settings.start, flagged))
        save_image(path, image, job, self.model, self.settings, self._also(flagged), sign)

    def _signing(self, origin: Origin) -> Sign | None:
        return None if self.credentials is None else partial(self.credentials.sign, origin=origin)

    def refuse(self, job: Job) -> None:
        """Notes that a job's image was flagged, and deletes that of an earlier run."""
        self.path(job).unlink(missing_ok=True)
        with publish(self._refusal(job)) as temporary:
            temporary.write_text(json.dumps(self._record(job, flagged=True)) + "\n")

    def _record(self, job: Job, flagged: bool) -> dict[str, Any]:
        return description(job, self.model, self.settings) | self._also(flagged)

    def _also(self, flagged: bool) -> dict[str, Any]:
        also: dict[str, Any] = {"safety_checker": self.safety_checker} if self.safety_checker else {}
        also |= {"flagged": True} if flagged else {}
        return also | ({"content_credentials": self.credentials.record} if self.credentials else {})

    def pending(self, batches: Sequence[Sequence[Job]]) -> list[Sequence[Job]]:
        """The batches that lack an image; drawn whole, so that a batch's images are of one run."""
        return [batch for batch in batches if not all(self.has(job) for job in batch)]

    def write_sheet(self, jobs: Sequence[Job], columns: int | None) -> Path:
        """Writes all existing images to a sheet, row by row; UserError if there are none.

        The sheet is `grid.png`, or if that is of other images, `grid-1.png` and so on.
        """
        drawn = [job for job in jobs if self.path(job).exists()]  # refused images do not
        images = [Image.open(self.path(job)).convert("RGB") for job in drawn]
        sheet, text = make_grid(images, columns), PngInfo()
        numbers = ",".join(self.path(job).stem for job in drawn)
        text.add_text(_SHEET_OF, numbers)
        names = itertools.chain([SHEET], (f"grid-{number}.png" for number in itertools.count(1)))
        path = next(path for name in names if _may_hold_sheet(path := self.folder / name, numbers))
        write_png(path, sheet, text, self._signing(Origin(path.name, start=self.settings.start)))
        return path


def _own_number(job: Job) -> int:
    return job.seed if job.number is None else job.number


def _without_verdict(made: Mapping[str, Any]) -> str:
    """The part of a record that says which image it is."""
    return json.dumps({name: value for name, value in made.items() if name not in _VERDICT}, sort_keys=True)


def _is_whole(path: Path, must_be_signed: bool) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
            return is_signed(image) or not must_be_signed
    except (OSError, ValueError, SyntaxError):
        return False


def _may_hold_sheet(path: Path, numbers: str) -> bool:
    if not path.exists():
        return True
    with Image.open(path) as sheet:
        return sheet.info.get(_SHEET_OF) == numbers


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
