"""Figures and images of a training run, for TensorBoard and, where wanted, Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.redaction import as_recorded


class Trackers:
    """Writes to all trackers of a run; belongs to the first rank.

    Args:
        folder: the run directory.
        config: the run.
        first_step: where training goes on; what was written after it does not count.
    """

    def __init__(self, folder: Path, config: TrainConfig, first_step: int):
        # The import takes a second, which ranks that write nothing need not spend.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._wandb = _start_wandb(folder, config) if config.tracking.wandb_project else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each named curve, after optimizer step `step`."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Shows an image, after optimizer step `step`."""
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")
        self._board.flush()
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends all of them; what was written stays."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, config: TrainConfig) -> Any:
    """The run at Weights & Biases, the same one after a resume."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "tracking.wandb_project needs the package wandb: pip install wandb, or set it to null."
        ) from error
    try:
        return wandb.init(
            project=config.tracking.wandb_project,
            name=config.name,
            id=_run_id(folder),
            resume="allow",
            dir=folder,
            config=as_recorded(config.model_dump(mode="json")),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"Weights & Biases did not start: {error}. Run `wandb login`, set WANDB_MODE=offline, or set "
            "tracking.wandb_project to null."
        ) from error


def _run_id(folder: Path) -> str:
    """What the run is called there; kept in the run directory."""
    path = folder / "wandb-id"
    if not path.exists():
        with publish(path) as temporary:
            temporary.write_text(os.urandom(6).hex() + "\n")
    return path.read_text().strip()
