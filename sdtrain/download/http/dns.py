"""Resolves each host name once, in its own thread, and accepts only names whose addresses are all public."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from sdtrain.dataset.addresses import is_public
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.single_flight import SingleFlightCache

# LAION has many dead hosts, and a name server that does not answer blocks a thread for half a minute.
_THREADS = 64
_KNOWN_S = 300
_UNKNOWN_S = 60
_NO_ANSWER_S = 5
"""Short, because a busy name server may answer next time."""
_UNKNOWN = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_Found = list[tuple[socket.AddressFamily, str]]


class Resolver(AbstractResolver):
    """aiohttp's resolver.

    One private address is enough to refuse a host, as any of its addresses may be the one connected to.
    """

    def __init__(self, allow_private: bool, timeout_s: float) -> None:
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._threads = asyncio.Semaphore(_THREADS)
        self._addresses: SingleFlightCache[str, _Found] = SingleFlightCache(self._look_up, _seconds_kept)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of `host`, for aiohttp; FetchError dns_failed or blocked_address."""
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in await self._addresses.get(host)
            if family in (socket.AF_UNSPEC, kind)
        ]

    async def close(self) -> None:
        """Does not wait for lookups in progress."""
        await self._addresses.close()

    async def _look_up(self, host: str) -> _Found:
        try:
            async with asyncio.timeout(None) as limit:
                await self._threads.acquire()
                limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
                found = await self._in_thread(host)
        except TimeoutError:
            # Its thread goes on, and another try soon afterwards would only wait for the same thread.
            raise FetchError("dns_failed", "no name server answers", transient=False) from None
        except socket.gaierror as error:
            if error.errno in _UNKNOWN:
                raise FetchError("dns_failed", "the name is not known", transient=False) from None
            raise FetchError("dns_failed", "no name server answers") from None
        if not self._allow_private and not all(is_public(address) for _, address in found):
            raise FetchError("blocked_address", "the host's name resolves to a private or reserved address")
        return found

    def _in_thread(self, host: str) -> asyncio.Future[_Found]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Found] = loop.create_future()

        def settle(found: Any, error: Exception | None) -> None:
            self._threads.release()
            if answer.done():
                return
            answer.set_exception(error) if error else answer.set_result(found)

        def work() -> None:
            found, error = None, None
            try:
                infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                found = list(dict.fromkeys((info[0], str(info[4][0])) for info in infos))
            except Exception as raised:  # the waiter must hear of any error
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop may be gone
                loop.call_soon_threadsafe(settle, found, error)

        # Not an executor's threads: at exit the process would wait for them as long as a name server is slow.
        threading.Thread(target=work, name=f"dns-{host}", daemon=True).start()
        return answer


def _seconds_kept(outcome: _Found | FetchError) -> float:
    if isinstance(outcome, FetchError) and outcome.reason == "dns_failed":
        return _NO_ANSWER_S if outcome.transient else _UNKNOWN_S
    return _KNOWN_S
