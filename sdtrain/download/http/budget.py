"""The time that one URL may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sdtrain.download.http.failures import TOO_SLOW, FetchError


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
