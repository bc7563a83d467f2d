"""Validates a run and samples previews from it, and writes the curves for TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_tokenizer
from sdtrain.preflight.training import check_trackers
from sdtrain.redaction import as_recorded
from sdtrain.sampling.checks import truncation_warnings
from sdtrain.sampling.sampler import Sampler, SampleSettings, make_grid
from sdtrain.training.distributed import Ranks
from sdtrain.training.run_dir import LOSS_PARTS, RunDir
from sdtrain.training.throughput import Measured, Progress, StepMetrics
from sdtrain.training.validation import Validation

if TYPE_CHECKING:
    from sdtrain.training.state import TrainingState


class Monitor:
    """Validates, previews and tracks a run. All ranks call every method together; the first one writes."""

    def __init__(self, config: TrainConfig, run_dir: RunDir, ranks: Ranks, state: TrainingState, first_step: int):
        self._config, self._run_dir, self._ranks, self._state = config, run_dir, ranks, state
        self._trackers = Trackers(run_dir.path, config, first_step) if ranks.is_first else None
        self._validation = state.validation() if config.validation.num_samples else None
        self._sampler: Sampler | None = None
        if ranks.is_first and config.previews.every:
            warn_of_truncated_previews(config)

    def close(self) -> None:
        """Ends the trackers."""
        if self._trackers is not None:
            self._trackers.close()

    def log(self, step: int, metrics: StepMetrics, measured: Measured) -> None:
        """Adds a line of the log to the curves."""
        values = {
            "train/loss": measured.loss,
            "train/lr": metrics.lr,
            "train/grad_norm": metrics.grad_norm,
            "train/num_skipped": metrics.num_skipped,
            "train/num_substituted": measured.num_substituted,
            "speed/images_per_s": measured.images_per_s,
            "speed/data_wait": measured.data_wait,
            "speed/memory_gb": measured.memory_gb,
        }
        if measured.mfu is not None:
            values["speed/mfu"] = measured.mfu
        parts = zip(LOSS_PARTS, measured.loss_parts, strict=True)
        self._track(step, values | {f"train/{name}": loss for name, loss in parts if not math.isnan(loss)})

    def on_step_end(self, step: int, progress: Progress, at: Callable[[int, str], None]) -> None:
        """Validates and samples previews when due after step `step`; calls `at` before each."""
        is_last = step == self._config.steps
        if self._validation is not None and (step % self._config.validation.every == 0 or is_last):
            at(step, "validation")
            with progress.paused():
                progress.validated(self._validate(self._validation, step, lambda: at(step, "validation")))
        every = self._config.previews.every
        if every and (step % every == 0 or is_last):
            at(step, "previews")
            with progress.paused():
                self._preview(step)

    def _validate(self, validation: Validation, step: int, moved: Callable[[], None]) -> float:
        """Writes the losses of averaged and raw weights; returns the mean of the averaged."""
        with self._state.averaged_weights():
            averaged = validation.losses(self._state.validation_losses, moved)
        raw = validation.losses(self._state.validation_losses, moved)
        means = {}
        for name, losses in {"ema": averaged, "raw": raw}.items():
            means[f"validation/loss_{name}"] = sum(losses) / len(losses)
            if self._ranks.is_first:
                for timestep, loss in zip(validation.timesteps, losses, strict=True):
                    self._run_dir.validation.add(step=step, weights=name, timestep=timestep, loss=loss)
        places = zip(validation.timesteps, averaged, strict=True)
        self._track(step, means | {f"validation/ema_t{timestep:04d}": loss for timestep, loss in places})
        return means["validation/loss_ema"]

    def _preview(self, step: int) -> None:
        config = self._config.previews
        self._sampler = self._sampler or Sampler(self._state.networks())
        mine = range(self._ranks.rank, len(config.prompts), self._ranks.world_size)
        with self._state.averaged_weights():
            settings = SampleSettings(config.guidance_scale, config.num_steps)
            images = self._sampler.sample([config.prompts[i] for i in mine], mine, settings)
        images = self._ranks.gather(images)
        if self._trackers is not None:
            sheet = make_grid(images)
            with publish(self._run_dir.preview(step)) as temporary:
                sheet.save(temporary, "PNG")
            self._trackers.image(step, "previews", sheet)

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.scalars(step, values)


def warn_of_truncated_previews(config: TrainConfig) -> None:
    """Prints what the text encoder will not see of the previews' prompts."""
    tokenizer = load_tokenizer(config.text_encoder)
    for warning in truncation_warnings(tokenizer, config.previews.prompts, "preview's prompt"):
        print(warning, flush=True)


class Trackers:
    """Writes to all trackers, on the first rank; discards points after `first_step`, where training resumes."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int):
        # The import takes a second, which ranks that write nothing can save.
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
        """Ends all trackers; written points stay."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, config: TrainConfig) -> Any:
    """The run at Weights & Biases, the same one after a resume."""
    check_trackers(config)
    import wandb

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
    path = folder / "wandb-id"
    if not path.exists():
        with publish(path) as temporary:
            temporary.write_text(os.urandom(6).hex() + "\n")
    return path.read_text().strip()
