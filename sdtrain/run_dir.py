"""The output directory of one training run: its config, log and DONE marker."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from sdtrain.config import TrainConfig, differences
from sdtrain.data.files import publish
from sdtrain.errors import UserError
from sdtrain.settings import dump_settings, load_settings

LOG_COLUMNS = ("step", "loss", "lr", "grad_norm", "images_per_s", "seconds", "data_wait")


class RunDir:
    """Where a run leaves what it makes.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self._config, self._log, self._done = path / "config.yaml", path / "log.csv", path / "DONE"

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
        changed = differences(load_settings(TrainConfig, self._config), config)
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}). Choose another --output, or "
                "delete it to start anew."
            )

    def begin(self, config: TrainConfig, step: int) -> float:
        """Writes the config and cuts the log back to `step`; returns the seconds trained until then."""
        with publish(self._config) as temporary:
            temporary.write_text(dump_settings(config))
        self._done.unlink(missing_ok=True)
        rows = [row for row in self.log() if int(row["step"]) <= step]
        with publish(self._log) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def log(self) -> list[dict[str, str]]:
        """The rows of the log so far; a last row cut short by a crash is left out."""
        if not self._log.exists():
            return []
        with self._log.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def add_to_log(self, **row: float) -> None:
        """Appends one row."""
        with self._log.open("a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)

    def finish(self, step: int, checkpoint: Path) -> None:
        """Marks the run as finished; written last."""
        with publish(self._done) as temporary:
            temporary.write_text(
                json.dumps({"step": step, "checkpoint": str(checkpoint.relative_to(self.path))}) + "\n"
            )
