"""Sends requests and follows redirects: to checked addresses, when the host may be asked, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import ClientResponse
from aiohttp.client_exceptions import ClientConnectorError, ClientSSLError, ConnectionTimeoutError
from multidict import CIMultiDictProxy
from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.body import Watch, read_body
from sdtrain.download.http.connections import Sessions
from sdtrain.download.http.dns import Resolver
from sdtrain.download.http.failures import FetchError, failure_of, failure_of_status
from sdtrain.download.http.host_limits import Host, Hosts
from sdtrain.download.http.retry import Budget, backoff_s, retry_after_s
from sdtrain.download.http.urls import redirect_url

_REDIRECTS = {301, 302, 303, 307, 308}
_COOLDOWN_STATUSES = {429, 503}


@dataclass(frozen=True)
class Answer:
    """An answer with its whole body; a redirect's body is left unread."""

    headers: CIMultiDictProxy[str]
    body: bytes
    location: str | None = None


Check = Callable[[CIMultiDictProxy[str]], None]
"""Raises a FetchError if an answer's headers forbid its use."""
Permit = Callable[[URL], Awaitable[None]]
"""Raises a FetchError if a URL must not be requested."""


class Transport:
    """Sends requests; create it inside a running event loop."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._resolver = Resolver(config.allow_private_hosts, config.timeout_s)
        self._sessions = Sessions(config, self._resolver)
        self._hosts = Hosts(config.connections_per_host, config.requests_per_host_s, max_cooldowns=config.retries + 1)
        self._requests = asyncio.Semaphore(config.connections)
        self._watch = Watch()

    async def close(self) -> None:
        """Closes all connections."""
        await self._sessions.close()
        await self._resolver.close()

    async def follow(
        self, url: URL, budget: Budget, permit: Permit, check: Check, max_bytes: int, cut: bool = False
    ) -> Answer:
        """The answer at the end of the redirects that begin at `url`; FetchError unless its status is 200.

        `permit` is called before each request; `check` for each answer, redirects included, before its body is read:
        what a site says about a redirecting URL is about the listed one. `cut` truncates bodies over `max_bytes`
        instead of failing.
        """
        for _ in range(self._config.max_redirects + 1):
            await permit(url)
            answer = await self._get(url, budget, check, max_bytes, cut)
            if answer.location is None:
                return answer
            url = redirect_url(url, answer.location, self._config.allow_private_hosts)
        raise FetchError("too_many_redirects", f"more than {self._config.max_redirects}")

    async def _get(self, url: URL, budget: Budget, check: Check, max_bytes: int, cut: bool) -> Answer:
        async with self._hosts.turn(url) as host:
            try:
                if not _is_literal(url):
                    # Before it counts as a request, because dead hosts' names are many and slow.
                    async with budget.spend():
                        await self._resolver.resolve(url.raw_host or "")
                async with (
                    self._requests,
                    budget.spend(),
                    self._sessions.of(url).get(url, allow_redirects=False) as response,
                ):
                    with self._watch.over(response):
                        return await _read(response, host, check, max_bytes, cut)
            except FetchError:
                raise
            except Exception as error:
                failure = failure_of(error)
                if _never_reached(error):
                    host.not_reached(failure)
                raise failure from error


async def _read(response: ClientResponse, host: Host, check: Check, max_bytes: int, cut: bool) -> Answer:
    if response.status in _COOLDOWN_STATUSES:
        raise _refused(response, host)
    host.answered()
    if response.status != 200:
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location is not None:
            check(response.headers)
            return Answer(response.headers, b"", location)
        raise failure_of_status(response.status)
    check(response.headers)
    return Answer(response.headers, await read_body(response, max_bytes, cut))


def _refused(response: ClientResponse, host: Host) -> FetchError:
    failure = failure_of_status(response.status)
    pause = retry_after_s(response.headers.get("Retry-After"))
    if response.status == 429 and pause is None:
        pause = backoff_s(1)
    if pause is None:
        host.answered()
        return failure
    return host.start_cooldown(pause, failure)


def _is_literal(url: URL) -> bool:
    host = url.raw_host or ""
    return ":" in host or host.rpartition(".")[2].isdigit()


def _never_reached(error: Exception) -> bool:
    refused = isinstance(error, ClientConnectorError) and not isinstance(error, ClientSSLError)
    return refused or isinstance(error, ConnectionTimeoutError)
