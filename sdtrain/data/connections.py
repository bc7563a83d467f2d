"""HTTP connections that go to checked addresses only and end in time."""

from __future__ import annotations

import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any

from sdtrain.data.addresses import is_public
from sdtrain.data.failures import FetchError

_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Limits:
    """What one fetch may do.

    Attributes:
        allow_private: connect to loopback and private networks too.
        deadline_s: seconds for everything together, redirects and body included.
        max_bytes: largest body.
        tls: one context for all connections: making one reads every certificate there is, which takes longer
            than most downloads. It honours SSL_CERT_FILE and SSL_CERT_DIR.
    """

    allow_private: bool
    deadline_s: float
    max_bytes: int = 64 * 2**20
    tls: ssl.SSLContext = field(default_factory=lambda: _tls_context())


class Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https, and nothing else."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        """For urllib, which finds it by its name."""
        return self._open(HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        """For urllib, which finds it by its name."""
        return self._open(partial(HTTPSConnection, context=self.limits.tls), request)

    def _open(self, make: Callable[..., HTTPConnection], request: urllib.request.Request) -> HTTPResponse:
        deadline: float = request.deadline  # type: ignore[attr-defined]

        def connection(host: str, **options: Any) -> HTTPConnection:
            made = make(host, **options)
            # http.client's own seam for the socket; TLS is put around it afterwards.
            made._create_connection = partial(connect, self.limits, deadline)  # type: ignore[attr-defined]
            made.response_class = partial(_Response, limits=self.limits, deadline=deadline)  # type: ignore[assignment]
            return made

        return self.do_open(connection, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def connect(
    limits: Limits, deadline: float, address: tuple[str, int], timeout_s: float, source: Any = None
) -> socket.socket:
    """A connected socket to the very address that was checked, so that a second look-up cannot lead elsewhere.

    Raises:
        FetchError: an address of the host is not public.
        OSError: no address answers.
    """
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    if not limits.allow_private and not all(is_public(str(info[4][0])) for info in found):
        raise FetchError("blocked_address", "the host's name resolves to a private or reserved address")
    failure: OSError | None = None
    for family, kind, protocol, _, resolved in found:
        made = _Socket(family, kind, protocol)
        try:
            made.settimeout(min(timeout_s, _left(deadline)))
            made.connect(resolved)
        except OSError as error:
            made.close()
            failure = error
        else:
            made.deadline = deadline
            return made
    raise failure or OSError("the host has no address")


class _Ends:
    """Waits for data no longer than the deadline allows; a socket's own timeout begins anew with every byte."""

    deadline: float

    def recv_into(self, *args: Any, **options: Any) -> int:
        left = _left(self.deadline)
        timeout_s = self.gettimeout()  # type: ignore[attr-defined]
        if timeout_s is None or left < timeout_s:
            self.settimeout(left)  # type: ignore[attr-defined]
        return super().recv_into(*args, **options)  # type: ignore[misc]


class _Socket(_Ends, socket.socket):
    pass


class _TlsSocket(_Ends, ssl.SSLSocket):
    deadline = float("inf")  # during the handshake the socket's timeout holds; `_Response` sets it afterwards


class _Response(HTTPResponse):
    """Reads the whole body up to a size, and notices when it ends early."""

    def __init__(self, sock: Any, *args: Any, limits: Limits, deadline: float, **options: Any) -> None:
        sock.deadline = deadline
        super().__init__(sock, *args, **options)
        self.max_bytes = limits.max_bytes

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        if (self.length or 0) > self.max_bytes:
            raise FetchError("too_large", f"over {self.max_bytes} bytes")
        body = bytearray()
        while chunk := super().read(_CHUNK_BYTES):
            body += chunk
            if len(body) > self.max_bytes:
                raise FetchError("too_large", f"over {self.max_bytes} bytes")
        if self.length:
            raise IncompleteRead(b"", self.length)
        return bytes(body)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context
