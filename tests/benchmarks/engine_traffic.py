"""Counts the work of a piece of training without a clock: bytes that operations move, functions that Python calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ONLY_WRITTEN = ("copy_", "zero_", "fill_", "empty")


class BytesMoved(TorchDispatchMode):
    """Adds up the sizes of what every operation reads and writes, whether from memory or from a cache.

    Attributes:
        num_bytes: the sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and counts it unless it only makes a view."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_bytes += _moved(func, args, kwargs or {}, result)
        return result


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name, given = func.overloadpacket.__name__, dict(kwargs)
    given |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    changed = {taken.name for taken in func._schema.arguments if taken.alias_info and taken.alias_info.is_write}
    if name == "_fused_adamw_" and given.get("grad_scale") is None:
        changed.remove("grads")  # it writes them only without their scale
    read = [value for argument, value in given.items() if not (argument in changed and name in _ONLY_WRITTEN)]
    written = [given.get(argument) for argument in changed] if changed or name.startswith("empty") else result
    return _size(read) + _size(written)


def _size(values: Any) -> int:
    """Bytes of all tensors in there; one that is given twice counts once."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


def python_calls(work: Callable[[], Any]) -> int:
    """Functions, Python's and C's, that Python calls during `work`, on this thread."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
