"""Convolution weights that stay channels_last in a flat optimizer state: stored as (O, kH, kW, I), used permuted.

An optimizer that keeps all parameters in one flat vector (DeepSpeed's ZeRO) drops their strides, so a weight must be
contiguous in channels_last order to reach the convolution that way. State dicts have the usual (O, I, kH, kW).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def stored_layout(weight: torch.Tensor) -> torch.Tensor:
    """(O, I, kH, kW) -> (O, kH, kW, I), contiguous."""
    return weight.permute(0, 2, 3, 1).contiguous()


def usual_layout(weight: torch.Tensor) -> torch.Tensor:
    """(O, kH, kW, I) -> (O, I, kH, kW), contiguous: a copy, of the same bits."""
    return weight.permute(0, 3, 1, 2).contiguous()


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose `weight` is (O, kH, kW, I); it saves and loads (O, I, kH, kW).

    The gradient of the permuted view comes back contiguous too, so that neither it nor the weight is transposed.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002  # the name that PyTorch has
        return super()._conv_forward(input, weight.permute(0, 3, 1, 2), bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = usual_layout(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if (name := f"{prefix}weight") in state_dict:
            state_dict[name] = stored_layout(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *others)


def store_channels_last(network: nn.Module) -> None:
    """Makes every convolution a `ChannelsLastConv2d`, with the same values and names.

    A kernel of 1 x 1 has the same bytes in both layouts and stays as it is.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size != (1, 1) and module.groups == 1:
            module.__class__ = ChannelsLastConv2d
            module.weight = nn.Parameter(stored_layout(module.weight.detach()), module.weight.requires_grad)


def channels_last_names(network: nn.Module) -> frozenset[str]:
    """Names of the weights that are stored as (O, kH, kW, I)."""
    named = network.named_modules()
    return frozenset(f"{name}.weight".lstrip(".") for name, module in named if isinstance(module, ChannelsLastConv2d))


def usual_shapes(network: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Name and usual shape of each trained parameter, in the optimizer's order."""
    permuted = channels_last_names(network)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.permute(0, 3, 1, 2).shape if name in permuted else parameter.shape
