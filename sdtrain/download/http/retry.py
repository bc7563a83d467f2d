"""Trying again where that can help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar

from sdtrain.download.http.budget import Budget
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.pauses import backoff_s

T = TypeVar("T")


async def with_retries(attempt: Callable[[], Awaitable[T]], retries: int, budget: Budget) -> T:
    """What `attempt` gives, called again after a pause while its failures may pass and there is time for it.

    Raises:
        FetchError: the last failure.
    """
    for number in count():
        try:
            return await attempt()
        except FetchError as error:
            if number >= retries or not error.passing or not await budget.pause(backoff_s(number)):
                raise
    raise AssertionError("the last attempt returns or raises")
