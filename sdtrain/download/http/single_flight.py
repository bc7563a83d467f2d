"""Caches values requested concurrently (addresses, site rules) and computes each once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sdtrain.download.http.failures import FetchError

K = TypeVar("K")
V = TypeVar("V")


class SingleFlightCache(Generic[K, V]):
    """A single-flight cache: concurrent requests for a value wait for one computation.

    Cancelling a waiter does not cancel the computation. Failures are cached too.
    """

    def __init__(
        self,
        make: Callable[[K], Awaitable[V]],
        seconds_kept: Callable[[V | FetchError], float],
        max_entries: int = 10_000,
    ) -> None:
        self._make = make
        self._seconds_kept = seconds_kept
        self._max_entries = max_entries
        self._kept: dict[K, tuple[V | FetchError, float]] = {}
        self._made: dict[K, asyncio.Task[V | FetchError]] = {}

    async def get(self, key: K) -> V:
        """The value for `key`; raises the FetchError of its computation."""
        kept = self._kept.get(key)
        if kept is not None and time.monotonic() < kept[1]:
            outcome = kept[0]
        else:
            task = self._made.get(key)
            if task is None:
                task = self._made[key] = asyncio.create_task(self._outcome(key))
            outcome = await asyncio.shield(task)
        if isinstance(outcome, FetchError):
            raise outcome.again()
        return outcome

    async def close(self) -> None:
        """Cancels the computations in progress."""
        tasks = list(self._made.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _outcome(self, key: K) -> V | FetchError:
        try:
            outcome: V | FetchError
            try:
                outcome = await self._make(key)
            except FetchError as error:
                outcome = error.again()  # without its traceback, which keeps the fetch's frames alive
            self._kept.pop(key, None)  # makes the new one the youngest
            self._kept[key] = outcome, time.monotonic() + self._seconds_kept(outcome)
            while len(self._kept) > self._max_entries:
                del self._kept[next(iter(self._kept))]
            return outcome
        finally:
            del self._made[key]
