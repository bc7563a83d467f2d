"""Sends requests and follows redirects: to checked addresses, when the host may be asked, within limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from aiohttp import BasicAuth, ClientResponse
from aiohttp.client_exceptions import (
    ClientConnectorError,
    ClientProxyConnectionError,
    ClientSSLError,
    ConnectionTimeoutError,
)
from multidict import CIMultiDictProxy
from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.body import Watch, read_body
from sdtrain.download.http.connections import Sessions
from sdtrain.download.http.dns import Resolver
from sdtrain.download.http.failures import FetchError, failure_of, failure_of_proxy, failure_of_status
from sdtrain.download.http.host_limits import Host, Hosts
from sdtrain.download.http.proxies import Proxies, Proxy
from sdtrain.download.http.retry import Budget, backoff_s, retry_after_s
from sdtrain.download.http.urls import redirect_url

_REDIRECTS = {301, 302, 303, 307, 308}
_COOLDOWN_STATUSES = {429, 503}
_PROXY_LOGIN = 407
_PROXIED_LOOKUP_S = 2.0
"""No name server may answer behind a proxy, and each name would wait for it."""


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


async def _always(url: URL) -> None:
    pass


def _anything(headers: CIMultiDictProxy[str]) -> None:
    pass


@dataclass(frozen=True)
class Terms:
    """How one URL is requested.

    Attributes:
        max_bytes: of the body.
        permit: called before each request.
        check: called for each answer, redirects included, before its body is read: what a site says about a redirecting
            URL is about the listed one.
        cut: truncate a longer body instead of failing.
        is_verified: refuse servers without a valid certificate.
    """

    max_bytes: int
    permit: Permit = _always
    check: Check = _anything
    cut: bool = False
    is_verified: bool = True


class Transport:
    """Sends requests; create it inside a running event loop."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._resolver = Resolver(config.allow_private_hosts, config.timeout_s)
        self._proxies = Proxies(config.proxy)
        self._sessions = Sessions(config, self._resolver)
        self._hosts = Hosts(config.connections_per_host, config.requests_per_host_s, max_cooldowns=config.retries + 1)
        self._requests = asyncio.Semaphore(config.connections)
        self._watch = Watch()

    async def close(self) -> None:
        """Closes all connections."""
        await self._sessions.close()
        await self._resolver.close()

    async def follow(self, url: URL, budget: Budget, terms: Terms) -> Answer:
        """The answer at the end of the redirects that begin at `url`; FetchError unless its status is 200."""
        for _ in range(self._config.max_redirects + 1):
            await terms.permit(url)
            answer = await self._get(url, budget, terms)
            if answer.location is None:
                return answer
            url = redirect_url(url, answer.location, self._config.allow_private_hosts)
        raise FetchError("too_many_redirects", f"more than {self._config.max_redirects}")

    async def _get(self, url: URL, budget: Budget, terms: Terms) -> Answer:
        proxy = self._proxies.of(url)
        if proxy and not terms.is_verified and proxy.url.scheme == "https":
            raise FetchError("tls_failed", "a proxy's own certificate must be valid")
        async with self._hosts.turn(url) as host:
            try:
                if not _is_literal(url):
                    # Before it counts as a request, because dead hosts' names are many and slow.
                    async with budget.spend():
                        await self._check_name(url.raw_host or "", proxy)
                async with self._requests, budget.spend(), self._request(url, proxy, terms) as response:
                    with self._watch.over(response):
                        if proxy and response.status == _PROXY_LOGIN:
                            raise failure_of_proxy(_PROXY_LOGIN)
                        return await _read(response, host, terms)
            except FetchError:
                raise
            except Exception as error:
                if proxy and proxy.is_at(getattr(error, "host", None), getattr(error, "port", None)):
                    raise FetchError("proxy_failed", "no connection to the proxy") from error
                failure = failure_of(error)
                if _never_reached(error):
                    host.not_reached(failure)
                raise failure from error

    def _request(self, url: URL, proxy: Proxy | None, terms: Terms) -> AbstractAsyncContextManager[ClientResponse]:
        session = self._sessions.of(url, is_proxied=proxy is not None, is_verified=terms.is_verified)
        if proxy is None:
            return session.get(url, allow_redirects=False)
        login = BasicAuth(*proxy.login, encoding="utf-8") if proxy.login else None
        return session.get(url, allow_redirects=False, proxy=proxy.url, proxy_auth=login)

    async def _check_name(self, host: str, proxy: Proxy | None) -> None:
        """FetchError if the host's name resolves to a private address, or, without a proxy, does not resolve.

        Behind a proxy there is often no name server that knows the web: what is not known here, the proxy must check.
        """
        if proxy is None:
            await self._resolver.resolve(host)
            return
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(_PROXIED_LOOKUP_S):
                    await self._resolver.resolve(host)
            except FetchError as error:
                if error.reason != "dns_failed":
                    raise


async def _read(response: ClientResponse, host: Host, terms: Terms) -> Answer:
    if response.status in _COOLDOWN_STATUSES:
        raise _refused(response, host)
    host.answered()
    if response.status != 200:
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location is not None:
            terms.check(response.headers)
            return Answer(response.headers, b"", location)
        raise failure_of_status(response.status)
    terms.check(response.headers)
    return Answer(response.headers, await read_body(response, terms.max_bytes, terms.cut))


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
    not_refused = (ClientSSLError, ClientProxyConnectionError)
    refused = isinstance(error, ClientConnectorError) and not isinstance(error, not_refused)
    return refused or isinstance(error, ConnectionTimeoutError)
