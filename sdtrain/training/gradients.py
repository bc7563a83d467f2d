"""The gradients of all parameters as one flat vector, to which autograd adds them itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_NORM_CHUNK = 2**16


class FlatGradients:
    """Gradients laid out as the network's flat weights are: each where its parameter is.

    Those of a step's first micro-batch are copied there after its backward pass. From then on the vector's views are
    the parameters' `grad`, and its dtype is their `grad_dtype`: PyTorch casts each gradient to it and adds it up as
    soon as it is computed. No Python runs for that, and no gradients wait in memory.

    `parameters` are views of `network`, which is flat and padded so that all ranks of `group` have equal parts of it.
    Gradients are added up and reduced in `dtype`; `part` is this rank's part of them.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        network: torch.Tensor,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ):
        self._group, self._num_ranks, self._dtype = group, dist.get_world_size(group), dtype
        self._flat = torch.zeros_like(network, dtype=dtype)
        self.part = self._flat.tensor_split(self._num_ranks)[dist.get_rank(group)]
        self._parameters = list(parameters)
        self._views = [self._flat.as_strided(p.shape, p.stride(), _offset(p, network)) for p in parameters]

    def begin(self) -> None:
        """Before the first backward pass of a step: forgets what was added up."""
        for parameter in self._parameters:
            parameter.grad, parameter.grad_dtype = None, parameter.dtype

    @torch.no_grad()
    def take_first(self) -> None:
        """After that pass: takes its gradients, and has those of later ones added to them."""
        found = [(view, p.grad) for view, p in zip(self._views, self._parameters, strict=True)]
        torch._foreach_copy_([view for view, grad in found if grad is not None], [g for _, g in found if g is not None])
        if missing := [view for view, grad in found if grad is None]:
            torch._foreach_zero_(missing)
        for view, parameter in zip(self._views, self._parameters, strict=True):
            parameter.grad, parameter.grad_dtype = None, self._dtype
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
    def norm(self, exact: bool) -> torch.Tensor:
        """L2 norm of the reduced gradient over all ranks' parts, fp32, on the device; all ranks take part.

        On CPUs float32 would lose 0.4 % in 50 million squares. So its chunks are added up in float64, and `exact` does
        that with every square, as DeepSpeed does, for twice the time.
        """
        if self.part.is_cuda:
            square = torch.linalg.vector_norm(self.part, dtype=torch.float32).square()
        else:
            square = torch.stack([_square(chunk, exact) for chunk in self.part.split(_NORM_CHUNK)]).sum().float()
        if self._num_ranks > 1:
            dist.all_reduce(square, group=self._group)
        return square.sqrt()

    def _require_views(self) -> None:
        """A gradient that autograd put elsewhere would be lost without a word."""
        if any(p.grad is not view for view, p in zip(self._views, self._parameters, strict=True)):
            raise RuntimeError("something replaced the gradient of a parameter")


def _square(chunk: torch.Tensor, exact: bool) -> torch.Tensor:
    if exact:
        return torch.linalg.vector_norm(chunk, dtype=torch.float64).square()
    whole = chunk.float()
    return torch.dot(whole, whole).double()


def _offset(parameter: torch.Tensor, network: torch.Tensor) -> int:
    if parameter.untyped_storage().data_ptr() != network.untyped_storage().data_ptr():
        raise RuntimeError("a parameter is no view of the network's flat weights")
    return int(parameter.storage_offset() - network.storage_offset())
