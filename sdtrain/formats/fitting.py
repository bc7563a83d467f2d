"""Fits a file's tensors to a network: all of them, under the network's names and in its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch

from sdtrain.errors import UserError


class Stored(Protocol):
    """Tensors in files, described without reading them."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> torch.Tensor: ...

    def shape(self, name: str, /) -> tuple[int, ...]:
        """The tensor's shape."""

    def is_floating(self, name: str, /) -> bool:
        """Whether the dtype is floating-point, of any width."""


class PartOf:
    """The tensors of `stored` whose names begin with `prefix`, to select one network of several; all if none do."""

    def __init__(self, stored: Stored, prefix: str) -> None:
        own = [name for name in stored if name.startswith(prefix)]
        self._stored, self._names = stored, own or list(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._stored.shape(name)

    def is_floating(self, name: str) -> bool:
        """Whether the dtype is floating-point."""
        return self._stored.is_floating(name)


class Fitted(Mapping[str, torch.Tensor]):
    """A network's tensors under its own names and in its own shapes, read on access.

    `names` maps the network's names to the files'; `shapes` are by the network's; `where` names the files in messages.
    UserError names the first tensor of another shape, or of integers.
    """

    def __init__(
        self, stored: Stored, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        self._stored, self._names, self._shapes = stored, dict(names), shapes
        for name, there in self._names.items():
            found, wanted = stored.shape(there), tuple(shapes[name])
            # A 1x1 convolution is a matrix product; tools write either.
            if found != wanted and _without_ones(found) != _without_ones(wanted):
                raise UserError(f"{where} holds another network: {there} has shape {found}, and not {wanted}.")
            if not stored.is_floating(there):
                raise UserError(
                    f"{where} holds {there} as whole numbers: it was quantised. Take the file of fp32 or fp16."
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[self._names[name]].reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def fit(
    stored: Stored,
    network: torch.nn.Module,
    spelling: Callable[[str], str | None],
    where: str,
) -> Fitted:
    """Matches the tensors of files, named `where` in messages, to all of a network's, which may be on `meta`.

    `spelling` maps a file's name to the network's, or to None for tensors that the network does not need. UserError
    names the first tensor that is missing, unknown, duplicated or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: there for name, there in one_name_each(stored, spelling, where).items() if name is not None}
    missing = [name for name in shapes if name not in found]
    unknown = sorted(there for name, there in found.items() if name not in shapes)
    if missing or unknown:
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise UserError(
            f"{where} does not hold {type(network).__name__} as its config describes it: of {len(shapes)} tensors "
            f"{len(missing)} are missing, and {len(unknown)} are unknown; {first}."
        )
    return Fitted(stored, {name: found[name] for name in shapes}, shapes, where)


def one_name_each(names: Iterable[str], spelling: Callable[[str], str | None], where: str) -> dict[str, str]:
    """Our name -> the file's name; UserError if the file holds a tensor under two names, as either could be meant."""
    found: dict[str, str] = {}
    for there in names:
        here = spelling(there)
        if here is None:
            continue
        if here in found:
            raise UserError(f"{where} holds one tensor twice, as {found[here]} and as {there}; take another file.")
        found[here] = there
    return found
