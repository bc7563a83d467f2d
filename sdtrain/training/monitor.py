"""What a run shows of itself beside its log: validation, previews, curves for TensorBoard and others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish
from sdtrain.sampling.sampler import Sampler, SampleSettings, make_grid
from sdtrain.training.distributed import Ranks
from sdtrain.training.run_dir import LOSS_PARTS, RunDir
from sdtrain.training.throughput import Measured, Progress, StepFigures
from sdtrain.training.trackers import Trackers
from sdtrain.training.validation import Validation

if TYPE_CHECKING:
    from sdtrain.training.state import TrainingState


class Observer:
    """Looks at a run from time to time. Every method is called by all ranks together; the first one writes.

    Args:
        config: the run.
        run_dir: where it leaves its output.
        ranks: this process among all.
        state: the networks.
        first_step: where training goes on.
    """

    def __init__(self, config: TrainConfig, run_dir: RunDir, ranks: Ranks, state: TrainingState, first_step: int):
        self._config, self._run_dir, self._ranks, self._state = config, run_dir, ranks, state
        self._trackers = Trackers(run_dir.path, config, first_step) if ranks.is_first else None
        self._validation = state.validation() if config.validation.num_samples else None
        self._sampler: Sampler | None = None

    def close(self) -> None:
        """Ends the trackers."""
        if self._trackers is not None:
            self._trackers.close()

    def log(self, step: int, figures: StepFigures, measured: Measured) -> None:
        """Adds a line of the log to the curves."""
        values = {
            "train/loss": measured.loss,
            "train/lr": figures.lr,
            "train/grad_norm": figures.grad_norm,
            "train/num_skipped": figures.num_skipped,
            "train/num_substituted": measured.num_substituted,
            "speed/images_per_s": measured.images_per_s,
            "speed/data_wait": measured.data_wait,
            "speed/memory_gb": measured.memory_gb,
        }
        if measured.mfu is not None:
            values["speed/mfu"] = measured.mfu
        parts = zip(LOSS_PARTS, measured.loss_parts, strict=True)
        self._track(step, values | {f"train/{name}": loss for name, loss in parts if not math.isnan(loss)})

    def look(self, step: int, progress: Progress, at: Callable[[int, str], None]) -> None:
        """Validates and samples where it is due after optimizer step `step`; `at` is told before each long piece."""
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
        """Writes the sheet of the fixed prompts."""
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
