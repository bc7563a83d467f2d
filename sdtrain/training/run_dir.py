"""The output directory of a training run: config and its changes, logs, lock, DONE marker, and the status they tell."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import MAY_CHANGE, Change, TrainConfig, changes, differences
from sdtrain.dataset.files import publish, refuse_url
from sdtrain.dataset.lock import DatasetLock, lock_folder
from sdtrain.errors import UserError
from sdtrain.settings import Settings, dump_settings, load_settings

NUM_LOSS_PARTS = 10
"""Equal parts of the noise schedule whose losses are logged apart."""

LOSS_PARTS = tuple(f"loss_part_{part}" for part in range(NUM_LOSS_PARTS))
_SPEED = ("images_per_s", "seconds", "data_wait", "mfu", "memory_gb")
_LOG = ("step", "loss", "lr", "grad_norm", *_SPEED, "num_skipped", "num_substituted", *LOSS_PARTS)
_SHOWN_METRICS = ("loss", "lr", "grad_norm", "images_per_s", "data_wait", "mfu", "memory_gb", "num_skipped")


class ConfigChanges(Settings):
    """What was changed when a run went on."""

    step: int
    """The first step that was done with the new settings."""
    changes: tuple[Change, ...]


class RunDir:
    """Where a run leaves what it makes.

    Attributes:
        path: the directory.
        log: a row every `log_every` steps.
        validation: a row for each timestep of each validation, of the averaged ("ema") and the raw weights.
        previews: folder with the sheets of samples.
    """

    def __init__(self, path: Path):
        self.path = refuse_url(path)
        self.log = StepTable(path / "log.csv", _LOG)
        self.validation = StepTable(path / "validation.csv", ("step", "weights", "timestep", "loss"))
        self.previews = path / "previews"
        self._config, self._done = path / "config.yaml", path / "DONE"
        self._changes = path / "config-changes.jsonl"

    def finished_step(self) -> int | None:
        """The step at which the run was finished, or None."""
        try:
            return int(json.loads(self._done.read_text())["step"])
        except (OSError, ValueError, KeyError):
            return None

    def check_config(self, config: TrainConfig) -> None:
        """Refuses to go on with a run if what a run keeps for life has changed.

        Raises:
            UserError: naming every such setting, why it is kept, and what may change.
        """
        if not self._config.exists():
            return
        if changed := differences(load_settings(TrainConfig, self._config), self.with_kept_precision(config)):
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(map(str, changed))}). It keeps them, because "
                f"{', '.join(change.reason for change in changed)}. Put them back, or choose another --output, with "
                f"--init_from {self.path} to begin with its weights. A run that goes on may change: "
                f"{', '.join(MAY_CHANGE)}."
            )

    def with_kept_precision(self, config: TrainConfig) -> TrainConfig:
        """The config with the precision that the run began with, where it says `auto` and there is a run."""
        if config.precision != "auto" or not self._config.exists():
            return config
        return config.model_copy(update={"precision": load_settings(TrainConfig, self._config).precision})

    def lock(self) -> DatasetLock:
        """Keeps other trainings out of the directory until it is closed or this process ends, kill -9 included.

        Raises:
            UserError: one is at work there, or it cannot be written.
        """
        return lock_folder(self.path, self.path / "run.lock", "training")

    def history(self) -> list[ConfigChanges]:
        """What was changed in the middle of the run, oldest first; `config.yaml` holds what came of it."""
        lines = self._changes.read_text().splitlines() if self._changes.exists() else []
        return [ConfigChanges.model_validate_json(line) for line in lines]

    def record_changes(self, config: TrainConfig, step: int) -> list[Change]:
        """Writes down, before `begin`, in what `config` differs from the run's until now, and returns it.

        What was changed at a later step, which is done again, counts from `step`.
        """
        made = changes(load_settings(TrainConfig, self._config), config) if self._config.exists() else []
        history = [entry.model_copy(update={"step": min(entry.step, step)}) for entry in self.history()]
        new = ConfigChanges(step=step, changes=tuple(made))
        if made and new not in history[-1:]:  # else it ended between here and `begin`
            history.append(new)
        if history:
            with publish(self._changes) as temporary:
                temporary.write_text("".join(f"{entry.model_dump_json()}\n" for entry in history))
        return made

    def begin(self, config: TrainConfig, step: int) -> float:
        """Writes the config and cuts the logs back to `step`; returns the seconds trained until then."""
        with publish(self._config) as temporary:
            temporary.write_text(dump_settings(config))
        self._done.unlink(missing_ok=True)
        self.validation.cut(step)
        rows = self.log.cut(step)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def preview(self, step: int) -> Path:
        """Where the sheet of samples of one step goes."""
        return self.previews / f"step-{step:08d}.png"

    def finish(self, step: int, checkpoint: Path) -> None:
        """Marks the run as finished; written last."""
        with publish(self._done) as temporary:
            temporary.write_text(
                json.dumps({"step": step, "checkpoint": str(checkpoint.relative_to(self.path))}) + "\n"
            )


class StepTable:
    """A CSV file whose first column is the optimizer step.

    Attributes:
        path: the file.
        columns: its header, "step" first; files of an earlier version may have fewer.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, tuple(columns)

    def rows(self) -> list[dict[str, str]]:
        """The rows so far; a last row cut short by a crash is left out."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def cut(self, step: int) -> list[dict[str, str]]:
        """Forgets what came after `step`; returns the rows that stay."""
        rows = [row for row in self.rows() if int(row["step"]) <= step]
        with publish(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def add(self, **row: float | str | None) -> None:
        """Appends one row; None leaves its column empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        path: its directory.
        name: its config's.
        step: optimizer steps in its log.
        num_steps: of the whole run.
        is_done: whether it was finished.
        metrics: of the last line of the log, by the log's names; what is empty there is left out.
        left_s: until its end at the last line's rate; 0 when finished.
        heartbeats_s: seconds since each rank's last sign of life, by rank; only of a run that is at work or was killed.
        free_bytes: on its disk.
    """

    path: Path
    name: str
    step: int
    num_steps: int
    is_done: bool
    metrics: Mapping[str, float]
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
    metrics = {name: float(last[name]) for name in _SHOWN_METRICS if last.get(name)}
    step, done = int(last.get("step", 0)), run.finished_step()
    rate = metrics.get("images_per_s")
    left_s = max(0, config.steps - step) * config.global_batch_size / rate if rate else None
    is_done = done is not None and done >= config.steps
    return RunStatus(
        path=path,
        name=config.name,
        step=max(step, done or 0),
        num_steps=config.steps,
        is_done=is_done,
        metrics=metrics,
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
