"""AdamW, the average and the network's own weights, renewed in one pass over a partition."""

from __future__ import annotations

from typing import Any

import torch

from sdtrain.training.ema import Ema
from sdtrain.training.optimizer import begin_moments

_CPU_CHUNK = 2**19


class PartitionUpdate:
    """Applies gradients to one rank's partition.

    On CPUs it goes chunk by chunk, so that the average and the network's copy read weights that AdamW has just left in
    the cache. A GPU's cache is too small for that to outweigh the launches.

    Args:
        adam: the optimizer of `master`.
        master: flat fp32 weights, (N,).
        network: the network's own weights of that partition, (N,).
        ema: what averages them.
    """

    def __init__(self, adam: torch.optim.Optimizer, master: torch.Tensor, network: torch.Tensor, ema: Ema):
        self._adam, self._master, self._network, self._ema = adam, master, network, ema
        self._is_fused = isinstance(adam, torch.optim.AdamW) and bool(adam.defaults["fused"])

    @torch.no_grad()
    def apply(self, gradient: torch.Tensor, factor: torch.Tensor | float | None) -> None:
        """Does a step with `gradient`, (N,), times `factor`, and leaves zeros there."""
        if not self._is_fused:
            self._step_of_the_optimizer(gradient, factor)
        settings = self._fused_settings() if self._is_fused else None
        averages = self._ema.averages()
        for chunk in self._chunks():
            master = self._master[chunk]
            if settings is not None:
                self._fused_step(chunk, _scaled(gradient[chunk], factor), settings)
            for average, weight in averages:
                average[chunk].lerp_(master, weight)
            self._network[chunk].copy_(master)
            gradient[chunk].zero_()
        self._ema.count_update()

    def _chunks(self) -> list[slice]:
        size = self._master.numel() if self._master.is_cuda else _CPU_CHUNK
        return [slice(first, first + size) for first in range(0, self._master.numel(), size)]

    def _step_of_the_optimizer(self, gradient: torch.Tensor, factor: torch.Tensor | float | None) -> None:
        self._master.grad = _scaled(gradient, factor)
        self._adam.step()
        self._master.grad = None

    def _fused_settings(self) -> dict[str, Any]:
        """Arguments of the kernel behind `torch.optim.AdamW(fused=True)`, for one more step."""
        group = self._adam.param_groups[0]
        self._moments = begin_moments(self._adam, self._master)
        self._moments["step"] += 1
        beta1, beta2 = group["betas"]
        same = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        return same | {"beta1": beta1, "beta2": beta2, "grad_scale": None, "found_inf": None}

    def _fused_step(self, chunk: slice, gradient: torch.Tensor, settings: dict[str, Any]) -> None:
        first, second = self._moments["exp_avg"][chunk], self._moments["exp_avg_sq"][chunk]
        step = [self._moments["step"]]
        torch._fused_adamw_([self._master[chunk]], [gradient], [first], [second], [], step, **settings)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor | float | None) -> torch.Tensor:
    """The gradient in float32, in its own memory where it is float32 already."""
    whole = gradient.float()
    return whole if factor is None else whole.mul_(factor)
