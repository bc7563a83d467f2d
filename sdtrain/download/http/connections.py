"""Opens connections: to public addresses, checked at the socket, or to a proxy, and within the limit on open files."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import time
from collections import OrderedDict
from pathlib import Path
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
    which would look like hosts that do not answer. Requests through a proxy have a pair of their own, whose every
    connection goes to the proxy, at whatever address; and so have those without verified certificates. Create it inside
    a running event loop.
    """

    def __init__(self, config: DownloadConfig, resolver: Resolver) -> None:
        self._config, self._resolver = config, resolver
        self._to_proxies = Resolver(allow_private=True, timeout_s=config.timeout_s)
        self._lately: OrderedDict[str, float] = OrderedDict()
        others = config.connections + _OTHER_FILES
        spare = raise_file_limit(others + _KEPT_HOSTS * config.connections_per_host) - others
        self._max_kept_hosts = max(0, min(_KEPT_HOSTS, spare // config.connections_per_host))
        self._tls = tls_context(config.ca_file)
        self._opened: dict[tuple[bool, bool, bool], ClientSession] = {}

    def of(self, url: URL, *, is_proxied: bool = False, is_verified: bool = True) -> ClientSession:
        """The session for a request to `url`."""
        kind = (self._may_keep(url), is_proxied, is_verified)
        if kind not in self._opened:
            self._opened[kind] = self._open(*kind)
        return self._opened[kind]

    async def close(self) -> None:
        """Closes all connections."""
        for session in self._opened.values():
            await session.close()
        await self._to_proxies.close()

    def _may_keep(self, url: URL) -> bool:
        host, now = host_of(url), time.monotonic()
        while self._lately and next(iter(self._lately.values())) < now - KEPT_OPEN_S:
            self._lately.popitem(last=False)
        if host not in self._lately and len(self._lately) >= self._max_kept_hosts:
            return False
        self._lately[host] = now
        self._lately.move_to_end(host)
        return True

    def _open(self, keep_open: bool, is_proxied: bool, is_verified: bool) -> ClientSession:
        resolver = self._to_proxies if is_proxied else self._resolver
        tls = self._tls if is_verified else _unverified_context()
        allow_private = is_proxied or self._config.allow_private_hosts
        return _session(self._config, connector(resolver, tls, allow_private, keep_open))


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
        trust_env=False,  # a proxy hides the address really contacted: `Proxies` chooses it
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


def tls_context(ca_file: str = "") -> ssl.SSLContext:
    """One context for all connections, because creating one reads every certificate, longer than most downloads take.

    It honours SSL_CERT_FILE and SSL_CERT_DIR, and also trusts the authorities of `ca_file`; UserError if that holds no
    PEM certificates.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        try:
            context.load_verify_locations(cafile=Path(ca_file).expanduser())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "no PEM certificates"
            raise UserError(f"download.ca_file: {ca_file} cannot be read ({why}).") from error
    return context


def _unverified_context() -> ssl.SSLContext:
    """For answers whose bytes the metadata's sha256 proves."""
    context = tls_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
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
