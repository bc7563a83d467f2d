"""Saves a training run and restores it, from its own checkpoint or from another model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.formats.any_model import is_run, training_weights
from sdtrain.formats.checkpoint import Checkpoint, average_name, find_checkpoint
from sdtrain.loading.sample_record import Origin
from sdtrain.loading.sample_store import SampleStore
from sdtrain.precision import torch_dtype
from sdtrain.training.checkpoint_writer import CheckpointSaver, CheckpointStore, first_nonfinite
from sdtrain.training.distributed import Ranks
from sdtrain.training.ema import Ema
from sdtrain.training.guards import StepGuard
from sdtrain.training.run_dir import RunDir
from sdtrain.training.zero_partition import ZeroPartition


class CheckpointManager:
    """Saves and restores a run's state, by all ranks together; as a context manager, finishes a pending checkpoint.

    `origin` is, after `restore`, the run's checkpoint that this run began with just now; None for other beginnings.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: RunDir,
        ranks: Ranks,
        samples: SampleStore,
        partition: ZeroPartition,
        ema: Ema,
        guard: StepGuard,
    ):
        self._config, self._run_dir, self._ranks, self._samples = config, run_dir, ranks, samples
        self._partition, self._ema, self._guard = partition, ema, guard
        self._store = CheckpointStore(
            run_dir.path,
            config.checkpoint,
            ranks.rank,
            ranks.world_size,
            ranks.checkpoint_group,
            torch_dtype(config.ema.snapshots),
        )
        self._saver = CheckpointSaver(self._store, config.checkpoint.mode)
        self.origin: Origin | None = None

    def restore(self) -> int:
        """Loads the newest checkpoint, else the weights of `init_from`; returns the steps done."""
        checkpoint = self._store.newest()
        self._store.forget_snapshots_after(checkpoint.layout.step if checkpoint else 0)
        if checkpoint is None:
            self._begin_from_other_model()
            return 0
        layout = checkpoint.layout
        if not self._samples.has_digest(layout.data_digest):
            raise UserError(
                f"{self._run_dir.path} was trained on other latents than {self._config.data.name} holds now. Choose "
                "another --output, or delete it to start again."
            )
        self._check_parameters(checkpoint)
        moments = {name: self._part(checkpoint, name) for name in ("exp_avg", "exp_avg_sq")}
        self._partition.restore(self._part(checkpoint, "master"), moments, layout.num_applied)
        self._partition.restore_loss_scaler(layout.loss_scaler)
        self._guard.state = layout.guard
        self._ema.go_on_from(self._part(checkpoint, "ema"), layout.ema_updates)
        self._restore_post_hoc(checkpoint)
        return layout.step

    def _restore_post_hoc(self, checkpoint: Checkpoint) -> None:
        layout = checkpoint.layout
        if missing := set(self._ema.post_hoc) - set(layout.post_hoc):
            lengths = ", ".join(f"{length:g}" for length in sorted(missing))
            raise UserError(
                f"The averages of ema.post_hoc span a whole run, and {self._run_dir.path} trained {layout.step} steps "
                f"without that of length {lengths}. Leave it out, or choose another --output, with --init_from "
                f"{self._run_dir.path}."
            )
        parts = {length: self._part(checkpoint, average_name(length)) for length in self._ema.post_hoc}
        self._ema.go_on_post_hoc(parts, layout.num_applied)

    def _begin_from_other_model(self) -> None:
        """Loads raw and averaged weights of another run or model, with a fresh optimizer.

        The average keeps that model's count of updates, as CompVis' does.
        """
        if self._config.init_from is None:
            return
        path = Path(self._config.init_from)
        if is_run(path) or not path.exists():
            checkpoint = find_checkpoint(path)
            self._check_parameters(checkpoint)
            raw, average = self._part(checkpoint, "master"), self._part(checkpoint, "ema")
            num_updates: int | None = checkpoint.layout.ema_updates
            self.origin = Origin(run=str(checkpoint.path.parent.parent), step=checkpoint.layout.step)
        else:
            raw_state, averaged_state, num_updates = training_weights(path)
            raw, average = (self._shard(state, path) for state in (raw_state, averaged_state))
        if self._ranks.any(any(first_nonfinite(part) is not None for part in (raw, average))):
            raise UserError(f"{path} holds weights that are not finite. Begin with another model.")
        self._partition.load_master(raw)
        self._ema.go_on_from(average, num_updates)  # those of ema.post_hoc begin with their run: update 1 forgets all

    def _shard(self, state: Mapping[str, torch.Tensor], path: Path) -> torch.Tensor:
        wanted = {slot.name: slot.shape for slot in self._partition.slots}
        if wanted != {name: tuple(tensor.shape) for name, tensor in state.items()}:
            raise _another_unet(path)
        return self._partition.shard(state)

    def _part(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        start = self._partition.start
        return checkpoint.read_as(self._partition.slots, name, start, start + self._partition.master.numel())

    def _check_parameters(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.holds(self._partition.slots):
            raise _another_unet(checkpoint.path)

    def save(self, step: int) -> None:
        """Writes a checkpoint after `step` optimizer steps, or starts a thread that does.

        UserError if this one or the previous one could not be written, or weights are not finite.
        """
        self._guard.check(step)
        self._saver.start(
            step,
            {"master": self._partition.master, "ema": self._ema.average}
            | self._partition.moments()
            | {average_name(length): average for length, average in self._ema.post_hoc.items()},
            config_digest=self._config.digest(),
            data_digest=self._samples.digest,
            parameters=self._partition.slots,
            post_hoc=tuple(self._ema.post_hoc),
            guard=self._guard.state,
            loss_scaler=self._partition.loss_scaler(),
            num_ema_updates=self._ema.num_updates,
        )

    def have_failed(self) -> bool:
        """Whether this rank knows that a pending checkpoint could not be written."""
        return self._saver.has_failed

    def finish(self, step: int, first_step: int) -> None:
        """Writes the last checkpoint, and DONE at the end of the run; UserError if a checkpoint cannot be written."""
        self._saver.wait()
        if step > first_step:
            self.save(step)
        checkpoint = self._saver.wait()
        is_done = step >= self._config.steps
        if is_done and self._ranks.is_first:
            newest = checkpoint or find_checkpoint(self._run_dir.path).path
            self._run_dir.finish(step, newest)
        if self._ranks.is_first:
            print(f"{'finished' if is_done else 'stopped'} at step {step}: {self._run_dir.path}", flush=True)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes a pending checkpoint, whose error must not hide that of training."""
        with suppress(Exception) if kind else nullcontext():
            self._saver.wait()


def _another_unet(path: Path) -> UserError:
    return UserError(f"{path} holds another UNet than the config's `unet` describes.")
