"""The piece of fp32 weights and optimizer state that DeepSpeed's ZeRO gives to each rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sdtrain.adam import read_moments, restore_moments
from sdtrain.checkpoint import slots_of
from sdtrain.guards import StepGuard

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroPartition:
    """One rank's view of ZeRO-1/2: all parameters as one flat fp32 vector, cut into equal parts, one a rank.

    It reads attributes of DeepSpeed that are not public, so pyproject pins DeepSpeed, and a test checks that a
    checkpoint read by name equals the engine's own full parameters.

    Attributes:
        master: this rank's part of the fp32 weights.
        slots: where each parameter lies in the whole vector.
        start: position of the part's first element in the whole vector.
    """

    def __init__(self, engine: DeepSpeedEngine, rank: int):
        zero = engine.optimizer
        if not isinstance(zero, DeepSpeedZeroOptimizer) or len(zero.bit16_groups) != 1:
            raise RuntimeError(f"expected one parameter group under ZeRO-1 or 2, not {type(zero).__name__}")
        self._zero = zero
        self.master: torch.Tensor = zero.single_partition_of_fp32_groups[0]
        self.slots = slots_of((name, p.shape) for name, p in engine.module.named_parameters() if p.requires_grad)
        if [slot.offset for slot in self.slots] != zero.round_robin_bit16_offsets[0]:
            raise RuntimeError("this DeepSpeed flattens parameters in another order; use the pinned version")
        self.start = rank * self.master.numel()
        self._judged_norm: torch.Tensor | None = None

    def add_up_in_fp32(self) -> None:
        """From now on gradients of micro-batches are added up, and sent, in float32; before the first backward pass."""
        if not self._zero.partition_gradients:
            self._zero.gradient_accumulation_dtype = torch.float32
            self._zero.use_separate_grad_accum = self._zero.use_grad_accum_attribute = True

    def let_judge(self, guard: StepGuard, reads_every_norm: bool) -> None:
        """Asks `guard` before every optimizer step; a step that it refuses changes nothing on any rank.

        DeepSpeed has one such place: `check_overflow`, after the gradients were reduced, which makes `step` drop them.
        Its own check reads all gradients once more; ours takes their norm, which `step` would compute anyway. In bf16
        the norm is not read unless asked for, so that the host need not wait for the device; in fp32 and fp16
        DeepSpeed reads it in every step.
        """
        zero, norm_of = self._zero, self._zero.scaled_global_norm
        if not reads_every_norm and zero.dtype is torch.bfloat16:
            zero.scaled_global_norm = lambda norm_type=2: _noted(norm_of(norm_type), guard)
            return

        def check_overflow(partition_gradients: bool = True) -> None:
            self._judged_norm = norm_of()
            zero.overflow = not guard.may_apply(float(self._judged_norm) / zero.loss_scale, self.can_rescale)

        def update_scale(overflow: bool = False) -> None:
            # A spike is not the scaler's business; one that cannot go lower would raise a bare Exception.
            is_overflow = overflow and not guard.is_finite
            if zero.loss_scaler.dynamic and (self.can_rescale or not is_overflow):
                zero.loss_scaler.update_scale(is_overflow)

        zero.check_grad_overflow, zero.check_overflow = True, check_overflow
        zero.scaled_global_norm = lambda norm_type=2: self._judged_norm
        zero._update_scale = update_scale

    @property
    def can_rescale(self) -> bool:
        """Whether a loss scaler is at work that can still lower its scale."""
        scaler = self._zero.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

    def loss_scaler(self) -> dict[str, float]:
        """State of the dynamic loss scaler; empty where there is none."""
        scaler = self._zero.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER_STATE} if scaler.dynamic else {}

    def restore_loss_scaler(self, state: Mapping[str, float]) -> None:
        """Puts it back. Without a state, or without a scaler, nothing happens: the precision was changed."""
        if self._zero.loss_scaler.dynamic:
            vars(self._zero.loss_scaler).update(state)

    def set_learning_rate(self, lr: float) -> None:
        """The rate of the next optimizer step."""
        for group in self._zero.param_groups:
            group["lr"] = lr

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's moments of this part; zeros before the first step."""
        return read_moments(self._zero.optimizer, self.master)

    @torch.no_grad()
    def restore(self, master: torch.Tensor, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Puts back weights and Adam's state as they were after `step` applied steps. All ranks take part."""
        restore_moments(self._zero.optimizer, self.master, moments, step)
        self.load_master(master)

    @torch.no_grad()
    def load_master(self, master: torch.Tensor) -> None:
        """Sets this part of the fp32 weights and refreshes the network's own copies. All ranks take part."""
        self.master.copy_(master)
        self._zero.update_lp_params()

    def cut(self, named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """This rank's part of whole weights given by name, fp32, padded with zeros at the end."""
        part = torch.zeros(self.master.numel(), dtype=torch.float32)
        for slot in self.slots:
            first, last = max(slot.offset, self.start), min(slot.offset + slot.numel, self.start + len(part))
            if first < last:
                flat = named[slot.name].detach().reshape(-1)[first - slot.offset : last - slot.offset]
                part[first - self.start : last - self.start] = flat.to("cpu", torch.float32)
        return part


def _noted(norm: torch.Tensor, guard: StepGuard) -> torch.Tensor:
    guard.note(norm)
    return norm
