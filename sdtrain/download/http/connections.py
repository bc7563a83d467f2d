"""Opens connections: to public addresses only, checked at the socket, and within the limit on open files.

They are kept open for recently asked hosts and closed after one request for the others.
"""

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
"""How long a connection stays open for the next request to its host."""


_LONGEST_HEADER_BYTES = 16 * 2**10
_MOST_HEADERS = 200
_KEPT_HOSTS = 256
_OTHER_FILES = 256
"""Files of the process that are no connections of the pool: images, libraries, threads that ask name servers."""


class Sessions:
    """Two pools, because aiohttp does not bound how many idle connections it keeps.

    With thousands of hosts in a shard a process would run out of files, and that would look as if its hosts
    did not answer. Made inside a running event loop.
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
        # Not the deadline, which a budget keeps; and times as they are set, not in whole seconds.
        timeout=ClientTimeout(
            total=None, connect=config.timeout_s, sock_read=config.timeout_s, ceil_threshold=float("inf")
        ),
        auto_decompress=False,
        trust_env=False,  # behind a proxy nobody could tell which address is really asked
        max_line_size=_LONGEST_HEADER_BYTES,
        max_field_size=_LONGEST_HEADER_BYTES,
        max_headers=_MOST_HEADERS,
    )


def user_agent(contact: str) -> str:
    """What this program tells servers about itself.

    Raises:
        UserError: the contact cannot be sent.
    """
    if not (contact.isascii() and contact.isprintable() and not set(contact) & set("()\\")):
        raise UserError(
            f"download.contact is {contact!r}, but it is sent in a header: plain ASCII letters without brackets, "
            "as in https://example.org/crawler or crawler@example.org."
        )
    return f"sdtrain/{sdtrain.__version__} ({f'+{contact}' if contact else 'collects images to train models on'})"


def connector(resolver: Resolver, tls: ssl.SSLContext, allow_private: bool, keep_open: bool) -> TCPConnector:
    """A pool of connections, of which none leads to an address that is not public.

    HTTP/1.1 only: LAION has 2.2 URLs a host, so HTTP/2 would have next to nothing to send side by side
    over one connection, and its header compression and flow control are one more thing to attack.
    """

    def checked_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if not allow_private and not is_public(str(address[0])):
            raise FetchError("blocked_address", "the address is private or reserved")
        return socket.socket(family, kind, protocol)

    return TCPConnector(
        ssl=tls,
        resolver=resolver,
        use_dns_cache=False,  # the resolver has its own, which also knows the names that there are not
        socket_factory=checked_socket,
        limit=0,  # requests are counted before they get here, so that none waits with its time running
        **({"keepalive_timeout": KEPT_OPEN_S} if keep_open else {"force_close": True}),
    )


def tls_context() -> ssl.SSLContext:
    """One for all connections: making one reads every certificate there is, which takes longer than most downloads.

    It honours SSL_CERT_FILE and SSL_CERT_DIR.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def raise_file_limit(wanted: int) -> int:
    """Lets this process open `wanted` files where the system allows it; gives how many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else soft
