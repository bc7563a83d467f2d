"""Caches values that many ask for at once, such as addresses and a site's rules, and computes each once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sdtrain.download.http.failures import FetchError

K = TypeVar("K")
V = TypeVar("V")


class SingleFlightCache(Generic[K, V]):
    """A cache with single flight: who asks for what is being made waits for it.

    A waiter that is cancelled does not take the making with it. Failures are kept too.
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
        """The value for `key`.

        Raises:
            FetchError: as the making of it did.
        """
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
        """Ends what is being made."""
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
                outcome = error.again()  # without its traceback, which holds on to the frames of the fetch
            self._kept.pop(key, None)  # so that the new one is the youngest
            self._kept[key] = outcome, time.monotonic() + self._seconds_kept(outcome)
            while len(self._kept) > self._max_entries:
                del self._kept[next(iter(self._kept))]
            return outcome
        finally:
            del self._made[key]
