"""Asks many questions at once, from code that is not asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from sdtrain.endpoint.answers import Answer
from sdtrain.endpoint.budget import Budget
from sdtrain.endpoint.client import Client
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request

ResultT = TypeVar("ResultT")
OnAnswer = Callable[[int, Answer], None]
"""Called with a request's number and its answer as soon as it is there, in any order, one at a time."""
_END = object()


def ask(
    config: EndpointConfig,
    requests: Iterable[Request],
    setting: str,
    budget: Budget | None = None,
    on_answer: OnAnswer = lambda number, answer: None,
) -> list[Answer]:
    """Asks all questions, `config.concurrency` at once, and returns the answers in their order.

    Requests are taken from their iterable only when one can be sent, in a thread, so that making them (decoding an
    image) does not delay answers, and few are in memory. Without `budget` what is spent here counts alone.

    Raises:
        EndpointError: a `UserError`: the server or a setting is at fault, or the budget is spent. `on_answer` was
            called for every answer that came until then.
    """
    return _run(_ask(config, iter(requests), setting, budget or Budget(config), on_answer))


def check_endpoint(config: EndpointConfig, setting: str) -> str:
    """Describes the model that will answer; EndpointError if the server does not answer or does not have it."""
    return _run(_check(config, setting))


async def _check(config: EndpointConfig, setting: str) -> str:
    async with Client(config, setting) as client:
        return await client.check()


async def _ask(
    config: EndpointConfig, requests: Iterator[Request], setting: str, budget: Budget, on_answer: OnAnswer
) -> list[Answer]:
    answers: dict[int, Answer] = {}
    numbered, one_at_a_time = enumerate(requests), asyncio.Lock()
    stopped = False

    async def work(client: Client) -> None:
        nonlocal stopped
        while True:
            async with one_at_a_time:
                item: Any = await asyncio.to_thread(next, numbered, _END)
            if item is _END:
                return
            if stopped := budget.is_spent:
                return
            number, request = item
            answer = await client.ask(request)
            budget.add(answer.usage) if answer.usage else None
            answers[number] = answer
            on_answer(number, answer)

    try:
        async with Client(config, setting) as client, asyncio.TaskGroup() as workers:
            for _ in range(config.concurrency):
                workers.create_task(work(client))
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        budget.save()
    if stopped:
        raise budget.spent_error(setting)
    return [answers[number] for number in range(len(answers))]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Runs it in this thread, or in another one where this thread already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "endpoint") as pool:
        return pool.submit(copy_context().run, asyncio.run, work).result()
