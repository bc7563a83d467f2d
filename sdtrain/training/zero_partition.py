"""The piece of fp32 weights and optimizer state that DeepSpeed's ZeRO gives to each rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed import DeepSpeedEngine

from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import slots_of
from sdtrain.models.layout import channels_last_names, usual_shapes
from sdtrain.training.deepspeed_internals import ZeroInternals
from sdtrain.training.optimizer import read_moments, restore_moments


class ZeroPartition:
    """One rank's view of ZeRO-1/2: all parameters as one flat fp32 vector, split into equal shards, one per rank.

    `zero` is DeepSpeed's optimizer, `master` this rank's shard of the fp32 weights and `start` its offset in the whole
    vector; `slots` are the parameters' positions and memory layouts there. UserError if --deepspeed_config changes the
    order of the parameters.
    """

    def __init__(self, engine: DeepSpeedEngine, rank: int):
        self.zero = ZeroInternals(engine)
        self.master = self.zero.master
        self.slots = slots_of(usual_shapes(engine.module), channels_last_names(engine.module))
        if [slot.offset for slot in self.slots] != self.zero.offsets:
            raise UserError(
                "DeepSpeed lays the parameters out in another order than checkpoints have them. Remove "
                "round_robin_gradients and parameter_alignment from --deepspeed_config."
            )
        self.start = rank * self.master.numel()

    def loss_scaler(self) -> dict[str, float]:
        """State of the dynamic loss scaler; empty where there is none."""
        return self.zero.loss_scaler

    def restore_loss_scaler(self, state: Mapping[str, float]) -> None:
        """Restores it. Does nothing without a state or a scaler: the precision was changed."""
        self.zero.loss_scaler = dict(state)

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's moments of this part; zeros before the first step."""
        return read_moments(self.zero.adam, self.master)

    @torch.no_grad()
    def restore(self, master: torch.Tensor, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Restores weights and Adam's state after `step` applied steps. All ranks take part."""
        restore_moments(self.zero.adam, self.master, moments, step)
        self.load_master(master)

    @torch.no_grad()
    def load_master(self, master: torch.Tensor) -> None:
        """Sets this part of the fp32 weights and refreshes the network's own copies. All ranks take part."""
        self.master.copy_(master)
        self.zero.refresh_network()

    def shard(self, named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Splits whole weights given by name; returns this rank's shard, fp32, padded with zeros at the end."""
        part = torch.zeros(self.master.numel(), dtype=torch.float32)
        for slot in self.slots:
            first, last = max(slot.offset, self.start), min(slot.offset + slot.numel, self.start + len(part))
            if first < last:
                flat = slot.flat(named[slot.name].detach())[first - slot.offset : last - slot.offset]
                part[first - self.start : last - self.start] = flat.to("cpu", torch.float32)
        return part
