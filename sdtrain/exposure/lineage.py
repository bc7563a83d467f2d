"""Reads the chain of runs behind a run, from the first to the last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.impact.energy import EnergyLog, Spent
from sdtrain.settings import load_settings
from sdtrain.training.run_dir import RunDir

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Ancestor:
    """One link of the chain: a run's path, or a model's name.

    `config` is None if it is no run, or is gone; `step`, the optimizer steps done, is None if not recorded.
    """

    source: str
    config: TrainConfig | None = None
    step: int | None = None
    sessions: tuple[Spent, ...] = ()


def ancestor(run: Path) -> Ancestor:
    """A run as a link; UserError if it is no run, or its config is unreadable."""
    config_file = run / "config.yaml"
    if not config_file.exists():
        raise UserError(f"{run} holds no training run (no config.yaml). Give a run's directory, such as runs/tiny.")
    config = load_settings(TrainConfig, config_file)
    return Ancestor(str(run), config, _step(run), tuple(EnergyLog(run / "energy.csv").sessions()))


def lineage(run: Path) -> list[Ancestor]:
    """The chain, from its first run to this one; UserError if the run itself cannot be read."""
    chain, seen = [ancestor(run)], {run.resolve()}
    while (config := chain[0].config) is not None and config.init_from is not None:
        path = _find(config.init_from, Path(chain[0].source))
        if path is None or path.resolve() in seen:
            return [Ancestor(config.init_from), *chain]
        seen.add(path.resolve())
        chain.insert(0, ancestor(path))
    return chain


def _find(init_from: str, run: Path) -> Path | None:
    """Finds the run of `init_from`: as written, beside this run, or the run that contains the checkpoint."""
    for path in (Path(init_from), run.parent / Path(init_from).name):
        for folder in (path, path.parent.parent):
            if (folder / "config.yaml").exists() and any(
                (folder / name).exists() for name in ("log.csv", _CHECKPOINTS)
            ):
                return folder
    return None


def _step(run: Path) -> int | None:
    """The last one that is recorded: a run that was stopped has a checkpoint of steps that it did not log."""
    log = RunDir(run).log
    logged = [int(row["step"]) for row in log.rows()[-1:]] if log.path.exists() else []
    saved = [
        int(path.parent.name.removeprefix("step-")) for path in run.glob(f"{_CHECKPOINTS}/step-[0-9]*/layout.json")
    ]
    done = RunDir(run).finished_step()
    return max([*logged, *saved, *([] if done is None else [done])], default=None)
