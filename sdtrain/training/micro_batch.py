"""Decides `micro_batch_size: auto`: the largest micro-batch that fits, before training.

On GPUs it tries forward and backward passes of growing size. A CPU's memory cannot be tried out, because the system
would end the process; there the activations that a backward pass keeps are counted on tensors without memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.models.backends import attention_kernels
from sdtrain.models.device import available_memory_bytes
from sdtrain.models.unet import LATENT_CHANNELS, build_unet, memory_format, prepare_for
from sdtrain.precision import torch_dtype
from sdtrain.training.distributed import Ranks
from sdtrain.training.run_dir import RunDir

_NUM_TOKENS = 77
_RESERVE = 0.05
"""Share of a GPU's memory left free: text encoder, communication, fragmentation."""
_TEMPORARIES = 1.6
"""A CPU's peak over the activations kept for the backward pass: 1.0 to 1.6 for UNets from 64 to 512 px."""
_HOST_SHARE = 0.8
"""Share of a CPU's free memory that training may take."""


@dataclass(frozen=True)
class Choice:
    """A micro-batch, and why it is not larger."""

    size: int
    reason: str


def decide_micro_batch(config: TrainConfig, run_dir: RunDir, ranks: Ranks) -> TrainConfig:
    """Replaces `micro_batch_size: auto` by the run's earlier choice, if it fits here, or by the largest that fits.

    All ranks take part and decide alike; which samples a step sees does not depend on it.

    Raises:
        UserError: not even the smallest fits.
    """
    if config.micro_batch_size != "auto":
        return config
    sizes = config.micro_batches(ranks.world_size)
    find = _largest_by_memory if ranks.device.type == "cpu" else _largest_by_trial
    kept = run_dir.kept_micro_batch()
    choice = find(config, ranks, [kept]) if kept in sizes else None
    if choice is None:
        choice = find(config, ranks, sizes)
    if choice is None:
        raise UserError(
            f"Not even a micro-batch of {sizes[0]} fits the memory of {ranks.device}. Use unet.gradient_checkpointing, "
            "optimizer.moments: int8, speed.fp32_gradients: false, or more ranks, which share the optimizer's state."
        )
    if ranks.is_first:
        print(f"micro_batch_size {choice.size} (auto): {choice.reason}", flush=True)
    return config.model_copy(update={"micro_batch_size": choice.size})


def largest_fitting(sizes: Sequence[int], attempt: Callable[[int], Any], ranks: Ranks) -> int | None:
    """Tries sizes, smallest first, until one does not fit on any rank; returns the one before, or None.

    Only running out of memory counts as not fitting; every other error is raised.
    """
    fitting = None
    for size in sizes:
        if ranks.any(not _fits(attempt, size)):
            return fitting
        fitting = size
    return fitting


def _fits(attempt: Callable[[int], Any], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        return False
    return True


def _largest_by_trial(config: TrainConfig, ranks: Ranks, sizes: Sequence[int]) -> Choice | None:
    total = torch.cuda.get_device_properties(ranks.device).total_memory
    attempt: Callable[[int], Any] | None = None
    try:
        attempt = _Trial(config, ranks, int(_RESERVE * total))
        found = largest_fitting(sizes, attempt, ranks)
    except torch.OutOfMemoryError:  # without any activations
        found = None
    finally:
        del attempt
        gc.collect()
        torch.cuda.empty_cache()
    reason = "all that the global batch leaves a rank" if found == sizes[-1] else "the next larger one does not fit"
    return None if found is None else Choice(found, f"{reason}, tried on {torch.cuda.get_device_name(ranks.device)}")


class _Trial:
    """Forward and backward passes beside as much memory as the whole training state takes."""

    def __init__(self, config: TrainConfig, ranks: Ranks, reserve_bytes: int):
        self._config, self._device, self._dtype = config, ranks.device, torch_dtype(config.precision)
        with torch.device("meta"):
            unet = build_unet(config.unet, config.latent_size)
        unet = unet.to_empty(device=ranks.device)
        for parameter in unet.parameters():
            parameter.data.zero_()
        # Nothing is compiled here, and the norms that a compiler fuses would keep more without one.
        speed = config.speed.model_copy(update={"compile": "off"})
        self._unet = prepare_for(unet, ranks.device, speed, for_training=True)
        torch.nn.Module.to(self._unet, self._dtype)
        beside = state_bytes(config, unet.num_parameters(), ranks.world_size) + reserve_bytes
        self._ballast = torch.empty(beside, dtype=torch.uint8, device=ranks.device)

    def __call__(self, size: int) -> None:
        """One pass each way, on zeros.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        try:
            with attention_kernels(self._config.speed):
                _loss(self._unet, self._config, size, self._device, self._dtype).backward()
        finally:
            self._unet.zero_grad(set_to_none=True)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def _loss(
    unet: UNet2DConditionModel, config: TrainConfig, size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The loss of a micro-batch of zeros."""
    shape = (size, LATENT_CHANNELS, config.latent_size, config.latent_size)
    noisy = torch.zeros(shape, dtype=dtype, device=device)
    context = torch.zeros(size, _NUM_TOKENS, config.unet.cross_attention_dim, dtype=dtype, device=device)
    timesteps = torch.zeros(size, dtype=torch.long, device=device)
    if device.type != "meta":
        noisy = noisy.to(memory_format=memory_format(device, config.speed))
    return unet(noisy, timesteps, context).sample.float().square().mean()


def state_bytes(config: TrainConfig, num_parameters: int, world_size: int) -> int:
    """Memory that a rank keeps beside the network, its gradients and its activations.

    Its share of master weights, averages and moments; the vector in which gradients are added up, which stands beside
    those of a backward pass; and with ZeRO-2 the bucket in which they are reduced.
    """
    moments = 8 if config.optimizer.moments == "fp32" else 2
    is_wider = config.speed.fp32_gradients and config.precision != "fp32"
    shared = (4 + 4 + moments + 4 * len(config.ema.post_hoc)) * num_parameters // world_size
    vector = 4 if config.speed.fp32_gradients else torch_dtype(config.precision).itemsize
    gradients = vector if config.zero_stage == 1 else (4 if is_wider else 0) + 4
    return shared + gradients * num_parameters


def _largest_by_memory(config: TrainConfig, ranks: Ranks, sizes: Sequence[int]) -> Choice | None:
    dtype = torch_dtype(config.precision)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    with torch.device("meta"):
        num_parameters = build_unet(config.unet, config.latent_size).num_parameters()
    state = state_bytes(config, num_parameters, ranks.world_size) + 2 * num_parameters * dtype.itemsize
    free = ranks.smallest(int(_HOST_SHARE * available_memory_bytes()) // num_local) - state
    one, two = (_TEMPORARIES * activation_bytes(config, size) for size in (1, 2))
    fitting = [size for size in sizes if one + (size - 1) * (two - one) <= free]
    if not fitting:
        return None
    needed = one + (fitting[-1] - 1) * (two - one)
    sizes_gb = f"{needed / 1e9:.2f} GB for activations beside {state / 1e9:.2f} GB of state"
    return Choice(fitting[-1], f"{sizes_gb}, with {(free + state) / 1e9:.2f} GB for each rank of this machine")


def activation_bytes(config: TrainConfig, size: int) -> int:
    """What a forward pass of `size` samples keeps for the backward pass on a CPU, parameters left out.

    Counted on tensors without memory; the number grows by a constant for each sample.
    """
    meta, dtype = torch.device("meta"), torch_dtype(config.precision)
    with meta:
        unet = build_unet(config.unet, config.latent_size)
    attention = "plain" if config.speed.attention == "auto" else config.speed.attention  # as on a CPU
    plain = {"channels_last": False, "attention": attention, "compile": "off"}
    prepare_for(unet, meta, config.speed.model_copy(update=plain))
    unet = torch.nn.Module.to(unet, dtype).train()
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _loss(unet, config, size, meta, dtype)
    return sum(storage.nbytes() for storage in kept.values())
