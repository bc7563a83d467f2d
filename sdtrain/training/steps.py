"""Forward and backward passes and optimizer steps of training under ZeRO: ours for ZeRO-1, DeepSpeed's for the rest.

DeepSpeed's would run a Python hook for each parameter in each micro-step, reduce every gradient to every rank, and
leave the average to a pass of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from sdtrain.config import TrainConfig
from sdtrain.precision import torch_dtype
from sdtrain.training.ema import Ema
from sdtrain.training.gradients import FlatGradients
from sdtrain.training.guards import StepGuard
from sdtrain.training.optimizer import PartitionUpdate
from sdtrain.training.zero_partition import ZeroPartition


class Steps(ABC):
    """A network in training. Call it, `backward` and `step` for each micro-batch, as with DeepSpeed's engine.

    The last micro-batch's `step` is the optimizer step: it asks the guard, and where that allows it renews weights,
    moments and average; else it changes nothing on any rank.

    Attributes:
        module: the network.
        optimizer: the optimizer of this rank's partition.
    """

    module: Any
    optimizer: torch.optim.Optimizer

    def __call__(self, *inputs: Any) -> Any:
        """The network's output."""
        return self.module(*inputs)

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds up the gradients of a micro-batch's mean loss."""

    @abstractmethod
    def step(self) -> None:
        """Ends a micro-step; with the last one, does the optimizer step. All ranks take part."""

    @abstractmethod
    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping; waits for the device."""


class FlatSteps(Steps):
    """Our own optimizer step, on ZeRO-1's partitions.

    Gradients are added up in one flat vector by autograd itself, reduced to the rank that owns them, and applied with
    the average in one pass.
    """

    def __init__(
        self, engine: DeepSpeedEngine, partition: ZeroPartition, ema: Ema, guard: StepGuard, config: TrainConfig
    ):
        self._zero, self._guard, self.module = partition.zero, guard, engine.module
        self.optimizer = self._zero.adam
        self._zero.release_gradients()
        dtype = torch.float32 if config.speed.fp32_gradients else torch_dtype(config.precision)
        self._gradients = FlatGradients(self._zero.parameters, self._zero.network, dtype, self._zero.group)
        self._update = PartitionUpdate(self._zero.adam, partition.master, self._zero.network_part, ema)
        self._only_notes = not reads_norms(config, partition.master.device)
        self._accumulation, self._num_added = engine.gradient_accumulation_steps(), 0
        self._norm = torch.zeros(())

    def backward(self, loss: torch.Tensor) -> None:
        """Adds up the gradients of a micro-batch's mean loss."""
        (loss / self._accumulation * self._zero.loss_scale).backward()
        if self._num_added == 0:
            self._gradients.take_first()

    def step(self) -> None:
        """Ends a micro-step; with the last one, does the optimizer step. All ranks take part."""
        self._num_added += 1
        if self._num_added == self._accumulation:
            self._num_added = 0
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        self._gradients.reduce()
        scale = self._zero.loss_scale
        self._norm = self._gradients.norm(exact=self._zero.max_grad_norm > 0) / scale
        if self._may_apply():
            self._update.apply(self._gradients.part, _factor(self._norm, scale, self._zero.max_grad_norm))
            self._zero.gather_network()
        self._gradients.begin()

    def _may_apply(self) -> bool:
        """Asks the guard, or only notes the norm for it, so that the host need not wait for the device."""
        if self._only_notes:
            self._guard.note(self._norm)
            return True
        may = self._guard.may_apply(float(self._norm), self._zero.can_rescale)
        self._zero.update_loss_scale(not self._guard.is_finite)
        return may

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping; waits for the device."""
        return float(self._norm)


def reads_norms(config: TrainConfig, device: torch.device) -> bool:
    """Whether the host reads the gradient's norm in every step: on request, for fp16's loss scale, or free on a CPU.

    In bf16 even a CPU does not, so that a test sees what a GPU would do.
    """
    if config.guard.reads_every_norm or config.precision == "fp16":
        return True
    return config.precision == "fp32" and device.type == "cpu"


def _factor(norm: torch.Tensor, scale: float, max_norm: float) -> torch.Tensor | float | None:
    """What takes the loss scale out of gradients whose norm without it is `norm`, and clips that norm."""
    if max_norm > 0:
        return 1.0 / (((norm + 1e-6) / max_norm).clamp(min=1.0) * scale)
    return None if scale == 1.0 else 1.0 / scale


class DeepSpeedSteps(Steps):
    """DeepSpeed's own optimizer step, followed by the average: for ZeRO-2, and for what a --deepspeed_config asks for.

    UserError if that rounds gradients that the training config wants in fp32.
    """

    def __init__(
        self, engine: DeepSpeedEngine, partition: ZeroPartition, ema: Ema, guard: StepGuard, config: TrainConfig
    ):
        self._engine, self._ema, self._guard, self.module = engine, ema, guard, engine.module
        zero = partition.zero
        self.optimizer = zero.adam
        self._accumulation, self._num_done = engine.gradient_accumulation_steps(), 0
        if config.speed.fp32_gradients:
            zero.add_up_in_fp32()
        if zero.is_bf16 and not config.guard.reads_every_norm:
            zero.before_each_step(guard.note)
        else:
            zero.ask_before_each_step(
                lambda norm: guard.may_apply(norm, zero.can_rescale), is_overflow=lambda: not guard.is_finite
            )

    def __call__(self, *inputs: Any) -> Any:
        """The network's output."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds up the gradients of a micro-batch's mean loss."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Ends a micro-step; with the last one, does the optimizer step. All ranks take part."""
        self._engine.step()
        self._num_done += 1
        if self._num_done % self._accumulation == 0 and self._guard.applied:
            self._ema.update()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping; waits for the device."""
        return float(self._engine.get_global_grad_norm())
