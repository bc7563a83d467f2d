"""What is measured while training, without waiting for the device in every step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.ranks import Ranks
from sdtrain.run_dir import RunDir

ItemT = TypeVar("ItemT")


class Progress:
    """Sums losses on the device and reads them only when a line is due."""

    def __init__(self, run_dir: RunDir, config: TrainConfig, ranks: Ranks, seconds_before: float):
        self._run_dir, self._config, self._ranks = run_dir, config, ranks
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._loss_sum: torch.Tensor | float = 0.0
        self._num_losses, self._wait_s = 0, 0.0
        self._window_started = self._started

    def timed(self, batches: Iterator[ItemT]) -> Iterator[ItemT]:
        """Passes batches on and counts how long training waited for them."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._wait_s += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor) -> None:
        """Counts the loss of one micro-batch."""
        self._loss_sum = self._loss_sum + loss.detach()
        self._num_losses += 1

    def check(self, step: int) -> float:
        """Mean loss since the last line, over all ranks.

        Raises:
            UserError: it is not finite.
        """
        loss = self._ranks.mean(float(self._loss_sum) / max(1, self._num_losses))
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} before step {step}. Training stopped; the last checkpoint is from before. Lower "
                "optimizer.lr, set optimizer.max_grad_norm to 1, or look for damaged latents."
            )
        return loss

    def line(self, step: int, lr: float, grad_norm: float) -> None:
        """Writes one line of the log, on the first rank, and begins a new window."""
        loss, now = self.check(step), time.monotonic()
        window_s = max(now - self._window_started, 1e-9)
        num_images = self._num_losses * self._config.micro_batch_size * self._ranks.world_size
        if self._ranks.is_first:
            self._run_dir.add_to_log(
                step=step,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                images_per_s=round(num_images / window_s, 2),
                seconds=round(self._seconds_before + now - self._started, 3),
                data_wait=round(self._wait_s / window_s, 4),
            )
            self._print(step, loss, lr, num_images / window_s, now)
        self._new_window()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the speed."""
        began = time.monotonic()
        yield
        self._window_started += time.monotonic() - began

    def _print(self, step: int, loss: float, lr: float, images_per_s: float, now: float) -> None:
        steps = self._config.steps
        left_s = (steps - step) * self._config.global_batch_size / images_per_s
        print(
            f"step {step}/{steps}  loss {loss:.4f}  lr {lr:.2e}  {images_per_s:.0f} img/s  "
            f"{now - self._started:.0f} s, {left_s:.0f} s left",
            flush=True,
        )

    def _new_window(self) -> None:
        self._window_started = time.monotonic()
        self._loss_sum, self._num_losses, self._wait_s = 0.0, 0, 0.0
