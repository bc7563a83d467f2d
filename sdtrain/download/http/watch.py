"""Ends of connections that aiohttp keeps to itself.

Where a body breaks the rules of HTTP half way, aiohttp closes the connection, but whoever reads waits for ever.
Where a body ends with its connection, one that is torn down looks like one that is closed in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

from aiohttp import ClientResponse

from sdtrain.download.http.failures import CUT_SHORT, NO_HTTP, FetchError


class Watch:
    """Ends the reading of a body when its connection is closed."""

    def __init__(self) -> None:
        self._heard: WeakSet[asyncio.Future[None]] = WeakSet()

    @contextmanager
    def over(self, response: ClientResponse) -> Iterator[None]:
        """The block reads `response.content`; it fails where it would wait in vain or take a part for the whole.

        Raises:
            FetchError: invalid_answer or truncated.
        """
        connection = response.connection
        if connection is None or connection.protocol is None:  # the body is here already
            yield
            return
        closed, ended = connection.protocol.closed, partial(_end, response)
        if closed is None:
            ended(None)
            yield
            return
        if closed not in self._heard:
            self._heard.add(closed)
            closed.add_done_callback(_hear)
        closed.add_done_callback(ended)
        try:
            yield
        finally:
            closed.remove_done_callback(ended)
        failure = response.content.exception()
        if failure is not None:  # it came after the last bytes were there
            raise failure


def _hear(closed: asyncio.Future[None]) -> None:
    # Connections are lost with an error all the time, also long after their last answer; nobody needs a log of that.
    if not closed.cancelled():
        closed.exception()


def _end(response: ClientResponse, closed: asyncio.Future[None] | None) -> None:
    content = response.content
    if content.exception() is not None:
        return
    if not content.is_eof():  # one that is cut short has been told so by now
        content.set_exception(FetchError("invalid_answer", NO_HTTP))
    elif closed is not None and not closed.cancelled() and closed.exception() and _ends_with_connection(response):
        content.set_exception(FetchError("truncated", CUT_SHORT))


def _ends_with_connection(response: ClientResponse) -> bool:
    return not {"Content-Length", "Transfer-Encoding"} & set(map(str.title, response.headers))
