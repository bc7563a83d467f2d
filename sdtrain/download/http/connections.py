"""Opens connections: only to public addresses, checked at the socket, and within the limit on open files."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import time
from collections import OrderedDict
from typing import Any

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

import sdtrain
from sdtrain.dataset.addresses import is_public
from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.dns import Resolver
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.host_limits import host_of
from sdtrain.errors import UserError

KEPT_OPEN_S = 15
"""A connection stays open this long for the next request to its host."""


_LONGEST_HEADER_BYTES = 16 * 2**10
_MOST_HEADERS = 200
_KEPT_HOSTS = 256
_OTHER_FILES = 256
"""The process's open files outside the pool: images, libraries, resolver threads."""


class Sessions:
    """Two pools, one that keeps connections open to recently asked hosts and one that closes them after each request.

    aiohttp does not limit its idle connections: with a shard's thousands of hosts the process would run out of files,
    which would look like hosts that do not answer. Create it inside a running event loop.
    """

    def __init__(self, config: DownloadConfig, resolver: Resolver) -> None:
        self._lately: OrderedDict[str, float] = OrderedDict()
        others = config.connections + _OTHER_FILES
        spare = raise_file_limit(others + _KEPT_HOSTS * config.connections_per_host) - others
        self._max_kept_hosts = max(0, min(_KEPT_HOSTS, spare // config.connections_per_host))
        tls = tls_context()
        self._kept = _session(config, connector(resolver, tls, config.allow_private_hosts, keep_open=True))
        self._closed_each = _session(config, connector(resolver, tls, config.allow_private_hosts, keep_open=False))

    def of(self, url: URL) -> ClientSession:
        """The session for a request to `url`."""
        host, now = host_of(url), time.monotonic()
        while self._lately and next(iter(self._lately.values())) < now - KEPT_OPEN_S:
            self._lately.popitem(last=False)
        if host not in self._lately and len(self._lately) >= self._max_kept_hosts:
            return self._closed_each
        self._lately[host] = now
        self._lately.move_to_end(host)
        return self._kept

    async def close(self) -> None:
        """Closes all connections."""
        await self._kept.close()
        await self._closed_each.close()


def _session(config: DownloadConfig, pool: TCPConnector) -> ClientSession:
    headers = {"User-Agent": user_agent(config.contact), "Accept": "*/*", "Accept-Encoding": "identity"}
    return ClientSession(
        connector=pool,
        headers=headers | ({"Connection": "close"} if pool.force_close else {}),
        cookie_jar=DummyCookieJar(),
        # Not the total deadline, which `Budget` keeps; and exact times, not rounded to seconds.
        timeout=ClientTimeout(
            total=None, connect=config.timeout_s, sock_read=config.timeout_s, ceil_threshold=float("inf")
        ),
        auto_decompress=False,
        trust_env=False,  # a proxy would hide the address really contacted
        max_line_size=_LONGEST_HEADER_BYTES,
        max_field_size=_LONGEST_HEADER_BYTES,
        max_headers=_MOST_HEADERS,
    )


def user_agent(contact: str) -> str:
    """The User-Agent header; UserError if the contact cannot be sent."""
    if not (contact.isascii() and contact.isprintable() and not set(contact) & set("()\\")):
        raise UserError(
            f"download.contact is {contact!r}, but it is sent in a header: plain ASCII letters without brackets, "
            "as in https://example.org/crawler or crawler@example.org."
        )
    return f"sdtrain/{sdtrain.__version__} ({f'+{contact}' if contact else 'collects images to train models on'})"


def connector(resolver: Resolver, tls: ssl.SSLContext, allow_private: bool, keep_open: bool) -> TCPConnector:
    """A pool of connections to public addresses only.

    HTTP/1.1 only: LAION has 2.2 URLs a host, so HTTP/2 would have almost nothing to multiplex, and its header
    compression and flow control add attack surface.
    """

    def checked_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if not allow_private and not is_public(str(address[0])):
            raise FetchError("blocked_address", "the address is private or reserved")
        return socket.socket(family, kind, protocol)

    return TCPConnector(
        ssl=tls,
        resolver=resolver,
        use_dns_cache=False,  # the resolver has its own, which also caches failures
        socket_factory=checked_socket,
        limit=0,  # requests are limited earlier, so that none waits with its time running
        **({"keepalive_timeout": KEPT_OPEN_S} if keep_open else {"force_close": True}),
    )


def tls_context() -> ssl.SSLContext:
    """One context for all connections, because creating one reads every certificate, longer than most downloads take.

    It honours SSL_CERT_FILE and SSL_CERT_DIR.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def raise_file_limit(wanted: int) -> int:
    """Raises this process's limit to `wanted` open files if the system allows; returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else soft
