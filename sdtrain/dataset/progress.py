"""How far a long piece of work is, told to whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """How far one step of a piece of work is.

    Attributes:
        name: what it does.
        done: how much is done, of `total`.
        total: how much there is to do.
        unit: what is counted.
        seconds: since it began.
    """

    name: str
    done: int
    total: int
    unit: str
    seconds: float

    def __str__(self) -> str:
        """For a line of a log."""
        said = f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"
        if not 0 < self.done < self.total:
            return said
        left_s = self.seconds * (self.total - self.done) / self.done
        return f"{said}, about {left_s / 60:.0f} min left" if left_s >= 120 else f"{said}, about {left_s:.0f} s left"


Listener = Callable[[Step], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Steps that are told in the block, and in its thread, go to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def seldom(listener: Listener, interval_s: float) -> Listener:
    """The listener, which hears of a step at most once an interval, and of none before one has passed."""
    heard = time.monotonic()

    def listen(step: Step) -> None:
        nonlocal heard
        now = time.monotonic()
        if now - heard >= interval_s:
            heard = now
            listener(step)

    return listen


def told(
    items: Iterable[T], name: str, total: int, unit: str, size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Passes items on, and tells how far it is whenever the next is asked for.

    Args:
        items: pieces of the work.
        name: of the step.
        total: how much there is to do.
        unit: what is counted.
        size: how much of it an item is.
    """
    listener, started, done = _listener.get(), time.monotonic(), 0
    for item in items:
        done += size(item)
        yield item
        del item  # which may be large, before the next is made
        if listener:
            listener(Step(name, done, total, unit, time.monotonic() - started))
