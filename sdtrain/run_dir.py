"""The output directory of one training run: its config, logs and DONE marker."""

from __future__ import annotations

import json
from pathlib import Path

from sdtrain.config import TrainConfig, differences
from sdtrain.data.files import publish
from sdtrain.errors import UserError
from sdtrain.settings import dump_settings, load_settings
from sdtrain.step_table import StepTable

NUM_LOSS_PARTS = 10
"""Equal parts of the noise schedule whose losses are logged apart."""

LOSS_PARTS = tuple(f"loss_part_{part}" for part in range(NUM_LOSS_PARTS))
_SPEED = ("images_per_s", "seconds", "data_wait", "mfu", "memory_gb")
_LOG = ("step", "loss", "lr", "grad_norm", *_SPEED, "num_skipped", "num_substituted", *LOSS_PARTS)


class RunDir:
    """Where a run leaves what it makes.

    Attributes:
        path: the directory.
        log: a row every `log_every` steps.
        validation: a row for each timestep of each validation, of the averaged ("ema") and the raw weights.
        previews: folder with the sheets of samples.
    """

    def __init__(self, path: Path):
        self.path = path
        self.log = StepTable(path / "log.csv", _LOG)
        self.validation = StepTable(path / "validation.csv", ("step", "weights", "timestep", "loss"))
        self.previews = path / "previews"
        self._config, self._done = path / "config.yaml", path / "DONE"

    def finished_step(self) -> int | None:
        """The step at which the run was finished, or None."""
        try:
            return int(json.loads(self._done.read_text())["step"])
        except (OSError, ValueError, KeyError):
            return None

    def check_config(self, config: TrainConfig) -> None:
        """Refuses to go on with a run of other settings.

        Raises:
            UserError: naming every setting that differs.
        """
        if not self._config.exists():
            return
        changed = differences(load_settings(TrainConfig, self._config), self.with_kept_precision(config))
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}). Choose another --output, or "
                "delete it to start anew."
            )

    def with_kept_precision(self, config: TrainConfig) -> TrainConfig:
        """The config with the precision that the run began with, where it says `auto` and there is a run."""
        if config.precision != "auto" or not self._config.exists():
            return config
        return config.model_copy(update={"precision": load_settings(TrainConfig, self._config).precision})

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
