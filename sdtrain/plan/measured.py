"""Reads and writes measured.json, the rates measured on GPUs of our own, which plans use."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.settings import Settings

MEASURED = Path(__file__).parent / "measured.json"
"""Missing before the first measurement."""


class MeasuredSpeed(Settings):
    """A training speed of SD v1's UNet, in the steady state of the whole training loop."""

    gpu: str
    """In lower case, as for `sdtrain plan --gpu`."""
    resolution: int
    num_gpus: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    images_per_s: float = Field(gt=0)
    """Of one GPU."""
    source: str
    """The command, and the location of its output."""
    commit: str = ""


def current_rate(name: str) -> str:
    """The name of a rate that earlier versions called `encode_pictures` or `picture_bytes_512`."""
    return name.replace("picture", "image")


class MeasuredRate(Settings):
    """Another stage's rate on a GPU, by its name in rates.yaml: `encode_images`, `score_images`."""

    gpu: str
    name: Annotated[str, AfterValidator(current_rate)]
    value: float = Field(gt=0)
    """In the unit of rates.yaml."""
    resolution: int | None = Field(default=None, gt=0)
    """Of the images, in px, if the rate is proportional to their pixels."""
    source: str
    commit: str = ""


class Measured(Settings):
    """All measurements."""

    training: tuple[MeasuredSpeed, ...] = ()
    rates: tuple[MeasuredRate, ...] = ()


def read_measured() -> Measured:
    """All measurements so far; UserError if the file is damaged."""
    return _read(MEASURED)


@lru_cache(maxsize=4)
def _read(path: Path) -> Measured:
    try:
        return Measured.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Measured()
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged, so no plan can be made from it: {error}. Delete or mend it.") from error


def record_measured(measured: Measured, path: Path | None = None) -> None:
    """Adds measurements to the file, replacing older ones of the same GPU, resolution, size and number."""
    path = path or MEASURED
    old = _read(path)
    training = {(s.gpu, s.resolution, s.num_gpus, s.micro_batch): s for s in (*old.training, *measured.training)}
    rates = {(rate.gpu, rate.name): rate for rate in (*old.rates, *measured.rates)}
    content = Measured(training=tuple(training.values()), rates=tuple(rates.values()))
    with publish(path) as temporary:
        temporary.write_text(content.model_dump_json(indent=1) + "\n")
    _read.cache_clear()
