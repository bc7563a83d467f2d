"""The output directory of one training run: its config and what was changed in it, logs, lock and DONE marker."""

from __future__ import annotations

import json
from pathlib import Path

from sdtrain.config import MAY_CHANGE, Change, TrainConfig, changes, differences
from sdtrain.dataset.files import publish, refuse_url
from sdtrain.dataset.lock import DatasetLock, lock_folder
from sdtrain.errors import UserError
from sdtrain.settings import Settings, dump_settings, load_settings
from sdtrain.training.step_table import StepTable

NUM_LOSS_PARTS = 10
"""Equal parts of the noise schedule whose losses are logged apart."""

LOSS_PARTS = tuple(f"loss_part_{part}" for part in range(NUM_LOSS_PARTS))
_SPEED = ("images_per_s", "seconds", "data_wait", "mfu", "memory_gb")
_LOG = ("step", "loss", "lr", "grad_norm", *_SPEED, "num_skipped", "num_substituted", *LOSS_PARTS)


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
