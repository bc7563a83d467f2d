"""The output directory of a training run: config and its changes, logs, lock, DONE marker and status."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import MAY_CHANGE, Change, TrainConfig, changes, differences, undone
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
    """Settings that changed when a run resumed."""

    step: int
    """The first step with the new settings."""
    changes: tuple[Change, ...]


class RunDir:
    """The files of a run.

    `log` has a row every `log_every` steps; `validation` a row per timestep of each validation, for averaged ("ema")
    and raw weights. `previews` is the folder of the sheets of samples, and `samples` the record of what the samples'
    numbers mean (`sdtrain.loading.sample_record`). `substitutes` has the samples that took the place of damaged ones.
    """

    def __init__(self, path: Path):
        self.path = refuse_url(path)
        self.log = StepTable(path / "log.csv", _LOG)
        self.validation = StepTable(path / "validation.csv", ("step", "weights", "timestep", "loss"))
        self.previews, self.samples = path / "previews", path / "samples.parquet"
        self.substitutes = path / "substitutes"
        self._config, self._done = path / "config.yaml", path / "DONE"
        self._changes = path / "config-changes.jsonl"

    def finished_step(self) -> int | None:
        """The step at which the run was finished, or None."""
        try:
            return int(json.loads(self._done.read_text())["step"])
        except (OSError, ValueError, KeyError):
            return None

    def check_config(self, config: TrainConfig) -> None:
        """Refuses to resume a run whose fixed settings changed.

        UserError names every such setting, the reason, and what may change.
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
        """The config with `precision: auto` replaced by that of the run so far, if there is one."""
        if config.precision != "auto" or not self._config.exists():
            return config
        return config.model_copy(update={"precision": load_settings(TrainConfig, self._config).precision})

    def kept_micro_batch(self) -> int | None:
        """The micro-batch of the run so far, if there is one."""
        return load_settings(TrainConfig, self._config).micro_batch if self._config.exists() else None

    def lock(self) -> DatasetLock:
        """Locks the directory until closed or until this process ends, kill -9 included.

        UserError if another training holds it, or it cannot be written.
        """
        return lock_folder(self.path, self.path / "run.lock", "training")

    def history(self) -> list[ConfigChanges]:
        """Changes made during the run, oldest first; `config.yaml` holds the result."""
        lines = self._changes.read_text().splitlines() if self._changes.exists() else []
        return [ConfigChanges.model_validate_json(line) for line in lines]

    def config_at(self, step: int) -> TrainConfig:
        """The config by which optimizer step `step` was made; UserError if there is none."""
        later = [change for entry in self.history() if entry.step > step for change in entry.changes]
        return undone(load_settings(TrainConfig, self._config), later)

    def record_changes(self, config: TrainConfig, step: int) -> list[Change]:
        """Records, before `begin`, how `config` differs from that of the run so far, and returns it.

        Changes made at a later step, which is repeated now, count from `step`.
        """
        made = changes(load_settings(TrainConfig, self._config), config) if self._config.exists() else []
        history = [entry.model_copy(update={"step": min(entry.step, step)}) for entry in self.history()]
        new = ConfigChanges(step=step, changes=tuple(made))
        if made and new not in history[-1:]:  # else the process ended between here and `begin`
            history.append(new)
        if history:
            with publish(self._changes) as temporary:
                temporary.write_text("".join(f"{entry.model_dump_json()}\n" for entry in history))
        return made

    def begin(self, config: TrainConfig, step: int) -> float:
        """Writes the config and truncates the logs to `step`; returns the seconds trained until then."""
        with publish(self._config) as temporary:
            temporary.write_text(dump_settings(config))
        self._done.unlink(missing_ok=True)
        self.validation.truncate(step)
        rows = self.log.truncate(step)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def preview(self, step: int) -> Path:
        """Path of a step's preview sheet."""
        return self.previews / f"step-{step:08d}.png"

    def finish(self, step: int, checkpoint: Path) -> None:
        """Marks the run as finished; written last."""
        with publish(self._done) as temporary:
            temporary.write_text(
                json.dumps({"step": step, "checkpoint": str(checkpoint.relative_to(self.path))}) + "\n"
            )


class StepTable:
    """A CSV file whose first column is the optimizer step.

    `columns` is its header, "step" first; files of an earlier version may have fewer.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, tuple(columns)

    def rows(self) -> list[dict[str, str]]:
        """The rows so far, without a last row that a crash left incomplete."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def truncate(self, step: int) -> list[dict[str, str]]:
        """Drops the rows after `step`; returns the others."""
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
    """The status of a run, as read from its files.

    `metrics` are those of the log's last line without empty columns, `left_s` extrapolates its rate. `heartbeats_s`,
    seconds since each rank's last heartbeat, exist only for a run that is active or was killed.
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
    """Reads the status of a run; UserError if its config cannot be read."""
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
