"""Sockets and TLS: the address is judged where it matters, at the socket that is about to be connected to it."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
from typing import Any

from aiohttp import TCPConnector

from sdtrain.dataset.addresses import is_public
from sdtrain.download.http.dns import Resolver
from sdtrain.download.http.failures import FetchError

KEPT_OPEN_S = 15
"""How long a connection stays open for the next request to its host."""


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
