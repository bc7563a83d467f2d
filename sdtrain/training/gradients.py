"""The gradients of all parameters as one flat vector, to which autograd adds them itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_NORM_CHUNK = 2**18


class FlatGradients:
    """Gradients laid out as the network's flat weights are: each where its parameter is.

    The vector's views are the parameters' `grad`, and its dtype is their `grad_dtype`: PyTorch casts each gradient to
    it and adds it up as soon as it is computed. No Python runs for that, and no second set of gradients waits for it.

    Args:
        parameters: views of `network`, which is flat and padded so that all ranks have equal parts of it.
        dtype: in which gradients are added up and reduced.
        group: all ranks.

    Attributes:
        part: this rank's part of the vector.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        network: torch.Tensor,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ):
        self._group, self._num_ranks = group, dist.get_world_size(group)
        self._flat = torch.zeros_like(network, dtype=dtype)
        before, self.part, after = _around_part(self._flat, dist.get_rank(group), self._num_ranks)
        self._others = [others for others in (before, after) if others.numel()]
        self._views = [(p, self._flat.as_strided(p.shape, p.stride(), _offset(p, network))) for p in parameters]
        for parameter, view in self._views:
            parameter.grad_dtype = dtype
            parameter.grad = view

    @torch.no_grad()
    def reduce(self) -> None:
        """Makes `part` that of the mean over ranks; all ranks take part.

        Each rank needs its own part only, which NCCL can scatter. Gloo's reduce-scatter is an all-reduce and copies, so
        the all-reduce is used there; it gives the same bits.
        """
        self._require_views()
        if self._num_ranks == 1:
            return
        if dist.get_backend(self._group) == "nccl":
            dist.reduce_scatter_tensor(self.part, self._flat, dist.ReduceOp.AVG, self._group)
        else:
            dist.all_reduce(self._flat, group=self._group)
            self.part.div_(self._num_ranks)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """L2 norm of the reduced gradient over all ranks' parts, fp32, on the device; all ranks take part.

        On CPUs its squares are added up in float64, as DeepSpeed does: float32 loses 0.4 % in 50 million of them.
        """
        if self.part.is_cuda:
            square = torch.linalg.vector_norm(self.part, dtype=torch.float32).square()
        else:
            norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in self.part.split(_NORM_CHUNK)]
            square = torch.stack(norms).square().sum().float()
        if self._num_ranks > 1:
            dist.all_reduce(square, group=self._group)
        return square.sqrt()

    @torch.no_grad()
    def clear(self) -> None:
        """Begins again with zeros."""
        self._flat.zero_()

    @torch.no_grad()
    def clear_others(self) -> None:
        """Zeroes the parts of other ranks; whoever read `part` zeroed it."""
        for others in self._others:
            others.zero_()

    def _require_views(self) -> None:
        """A gradient that autograd put elsewhere would be lost without a word."""
        if any(parameter.grad is not view for parameter, view in self._views):
            raise RuntimeError("something replaced the gradient of a parameter")


def _around_part(flat: torch.Tensor, rank: int, num_ranks: int) -> tuple[torch.Tensor, ...]:
    size = flat.numel() // num_ranks
    return torch.split(flat, [rank * size, size, flat.numel() - (rank + 1) * size])


def _offset(parameter: torch.Tensor, network: torch.Tensor) -> int:
    if parameter.untyped_storage().data_ptr() != network.untyped_storage().data_ptr():
        raise RuntimeError("a parameter is no view of the network's flat weights")
    return int(parameter.storage_offset() - network.storage_offset())
