"""Retries a URL within its time budget, after random pauses that grow."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TypeVar

from sdtrain.download.http.failures import TOO_SLOW, FetchError

LONGEST_PAUSE_S = 60.0
"""A server that wants a longer cooldown gets it, but nobody waits for that: its URLs fail."""
_FIRST_PAUSE_S = 0.5


T = TypeVar("T")


class Budget:
    """Seconds for all requests of one URL together: every attempt, every redirect, and the pauses in between.

    Waiting for the host's turn does not count: it says nothing about the URL, and with many URLs of one
    host it would fail those at the end of the queue. It ends all the same: whoever is ahead has a
    budget too, and pauses that a host asks for are bounded by `Host`.
    """

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    @asynccontextmanager
    async def spend(self) -> AsyncIterator[None]:
        """Counts the time of the block, and ends it when nothing is left.

        Raises:
            FetchError: timeout.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._left_s)) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise FetchError("timeout", TOO_SLOW) from None
            raise
        finally:
            self._left_s -= time.monotonic() - started

    async def pause(self, seconds: float) -> bool:
        """Sleeps; False, and at once, where that would leave nothing for another attempt."""
        if seconds >= self._left_s:
            return False
        self._left_s -= seconds
        await asyncio.sleep(seconds)
        return True


def backoff_s(attempt: int) -> float:
    """A random pause up to twice as long after each attempt (full jitter)."""
    return random.uniform(0, min(LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))


def retry_after_s(header: str | None) -> float | None:
    """The pause that a Retry-After header asks for, in seconds or as a date; None where it says nothing sensible."""
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


async def with_retries(attempt: Callable[[], Awaitable[T]], retries: int, budget: Budget) -> T:
    """What `attempt` gives, called again after a pause while its failures may pass and there is time for it.

    Raises:
        FetchError: the last failure.
    """
    for number in count():
        try:
            return await attempt()
        except FetchError as error:
            if number >= retries or not error.transient or not await budget.pause(backoff_s(number)):
                raise
    raise AssertionError("the last attempt returns or raises")
