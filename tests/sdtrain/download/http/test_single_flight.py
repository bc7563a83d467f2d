"""Values made once for all who ask."""

import asyncio

import pytest

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.single_flight import SingleFlightCache


def test_a_waiter_that_gives_up_does_not_spoil_it_for_the_others():
    made = []

    async def make(key):
        made.append(key)
        await asyncio.sleep(0.1)
        return key * 2

    async def run():
        shared = SingleFlightCache(make, lambda outcome: 60)
        first = asyncio.create_task(shared.get("a"))
        second = asyncio.create_task(shared.get("a"))
        await asyncio.sleep(0.02)
        first.cancel()
        return await second, await shared.get("a")

    assert asyncio.run(run()) == ("aa", "aa")
    assert made == ["a"]


def test_failures_are_kept_as_long_as_told_and_are_new_exceptions_each_time():
    made = []

    async def make(key):
        made.append(key)
        raise FetchError("dns_failed", "no")

    async def run():
        shared = SingleFlightCache(make, lambda outcome: 0.1 if isinstance(outcome, FetchError) else 60)
        errors = []
        for pause in (0, 0, 0.15):
            await asyncio.sleep(pause)
            with pytest.raises(FetchError) as caught:
                await shared.get("a")
            errors.append(caught.value)
        return errors

    errors = asyncio.run(run())
    assert len(made) == 2
    assert len({id(error) for error in errors}) == 3


def test_the_oldest_are_forgotten_first():
    made = []

    async def make(key):
        made.append(key)
        return key

    async def run():
        shared = SingleFlightCache(make, lambda outcome: 60, max_entries=2)
        for key in (1, 2, 3, 3, 2, 1):
            await shared.get(key)

    asyncio.run(run())
    assert made == [1, 2, 3, 1]
