"""Retries a URL within its time budget, after growing random pauses."""

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
"""A host gets a longer cooldown if it asks for one, but its URLs fail instead of waiting."""
_FIRST_PAUSE_S = 0.5


T = TypeVar("T")


class Budget:
    """The seconds for all of one URL's requests: attempts, redirects and the pauses in between.

    Waiting for the host's turn does not count: it says nothing about the URL, and would fail the end of a long queue
    for one host. It is finite all the same: the URLs ahead have budgets too, and `Host` bounds cooldowns.
    """

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    @asynccontextmanager
    async def spend(self) -> AsyncIterator[None]:
        """Counts the block's time; FetchError timeout when none is left."""
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
        """Sleeps and returns True, or returns False at once if no time would be left for another attempt."""
        if seconds >= self._left_s:
            return False
        self._left_s -= seconds
        await asyncio.sleep(seconds)
        return True


def backoff_s(attempt: int) -> float:
    """A random pause whose upper limit doubles after each attempt (full jitter)."""
    return random.uniform(0, min(LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))


def retry_after_s(header: str | None) -> float | None:
    """The pause in a Retry-After header, given in seconds or as a date; None if it is not sensible."""
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


async def with_retries(attempt: Callable[[], Awaitable[T]], retries: int, budget: Budget) -> T:
    """Calls `attempt` again after transient failures, with pauses, while time is left; raises the last FetchError."""
    for number in count():
        try:
            return await attempt()
        except FetchError as error:
            if number >= retries or not error.transient or not await budget.pause(backoff_s(number)):
                raise
    raise AssertionError("the last attempt returns or raises")
