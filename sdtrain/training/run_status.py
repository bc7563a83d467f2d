"""How far a training run is: told from what it has written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import TrainConfig
from sdtrain.settings import load_settings
from sdtrain.training.run_dir import RunDir

_FIGURES = ("loss", "lr", "grad_norm", "images_per_s", "data_wait", "mfu", "memory_gb", "num_skipped")


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        path: its directory.
        name: its config's.
        step: optimizer steps in its log.
        num_steps: of the whole run.
        is_done: whether it was finished.
        figures: of the last line of the log, by the log's names; what is empty there is left out.
        left_s: until its end at the last line's rate; 0 when finished.
        heartbeats_s: seconds since each rank's last sign of life, by rank; only of a run that is at work or was killed.
        free_bytes: on its disk.
    """

    path: Path
    name: str
    step: int
    num_steps: int
    is_done: bool
    figures: Mapping[str, float]
    left_s: float | None
    heartbeats_s: Mapping[int, float]
    free_bytes: int


def is_run_dir(path: Path) -> bool:
    """Whether a directory is a training run's."""
    return (path / "config.yaml").exists() and not (path / "recipe.yaml").exists()


def run_status(path: Path) -> RunStatus:
    """How far a run is.

    Raises:
        UserError: its config cannot be read.
    """
    run, config = RunDir(path), load_settings(TrainConfig, path / "config.yaml")
    rows = run.log.rows()
    last = rows[-1] if rows else {}
    figures = {name: float(last[name]) for name in _FIGURES if last.get(name)}
    step, done = int(last.get("step", 0)), run.finished_step()
    rate = figures.get("images_per_s")
    left_s = max(0, config.steps - step) * config.global_batch_size / rate if rate else None
    is_done = done is not None and done >= config.steps
    return RunStatus(
        path=path,
        name=config.name,
        step=max(step, done or 0),
        num_steps=config.steps,
        is_done=is_done,
        figures=figures,
        left_s=0.0 if is_done else left_s,
        heartbeats_s=_heartbeats(path / "heartbeats"),
        free_bytes=shutil.disk_usage(path).free,
    )


def _heartbeats(folder: Path) -> dict[int, float]:
    found = {}
    for file in sorted(folder.glob("rank-*.json")):
        with suppress(OSError):  # the run ended meanwhile
            found[int(file.stem.removeprefix("rank-"))] = max(0.0, time.time() - file.stat().st_mtime)
    return found
