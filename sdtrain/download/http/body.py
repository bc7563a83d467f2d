"""Reads response bodies within a size limit, compressed or not, and detects every early end.

The limit also holds for unpacked bytes, because a few kilobytes of gzip can hold gigabytes.

`Watch` relies on aiohttp internals: `ClientResponse.connection.protocol.closed` and `StreamReader.set_exception`. If a
body breaks HTTP's rules half way, aiohttp closes the connection but the reader waits for ever; and for a body that ends
with its connection, a torn-down connection looks like an orderly close. test_client.py, with the server of
hostile_web.py, fails if a new aiohttp behaves differently.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

from aiohttp import ClientResponse

from sdtrain.download.http.failures import ENDED_EARLY, INVALID_HTTP, FetchError

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_ENCODINGS = {"gzip", "x-gzip", "deflate"}
_SHOWN = 40


async def read_body(response: ClientResponse, max_bytes: int, cut: bool = False) -> bytes:
    """The whole body, unpacked.

    Args:
        response: its body unread, from a session that does not decompress.
        max_bytes: limit for the bytes sent and for those unpacked.
        cut: truncate a longer body instead of failing.

    Raises:
        FetchError: too_large, truncated, unknown_encoding or invalid_answer.
        aiohttp.ClientError: the connection failed.
    """
    unpack = _unpacker(response, max_bytes)
    if not cut and (response.content_length or 0) > max_bytes:
        raise too_large(max_bytes)
    parts: list[bytes] = []
    size = sent = 0
    while chunk := await response.content.readany():
        sent += len(chunk)
        if unpack:
            chunk = unpack(chunk)
        parts.append(chunk)
        size += len(chunk)
        if max(size, sent) > max_bytes:
            if cut:
                return b"".join(parts)[:max_bytes]
            raise too_large(max_bytes)
    if unpack:
        unpack.check_end()
    return b"".join(parts)


def too_large(max_bytes: int) -> FetchError:
    """The error for a body over `max_bytes`."""
    return FetchError("too_large", f"over {max_bytes} bytes")


def _unpacker(response: ClientResponse, max_bytes: int) -> _Unpacker | None:
    tokens = ",".join(response.headers.getall("Content-Encoding", ())).lower().split(",")
    encodings = [token.strip() for token in tokens if token.strip() not in ("", "identity")]
    if not encodings:
        return None
    if len(encodings) > 1 or encodings[0] not in _ENCODINGS:
        raise FetchError("unknown_encoding", ascii(", ".join(encodings)[:_SHOWN]))
    return _Unpacker(max_bytes)


class _Unpacker:
    """Decompresses gzip with any number of members, zlib, or the bare deflate that some servers send for it."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes + 1
        self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._started = False

    def __call__(self, chunk: bytes) -> bytes:
        out = bytearray()
        while chunk and self._left > 0:
            if self._stream.eof:  # another member, or padding
                if not chunk.startswith(b"\x1f"):
                    break
                self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)
            out += self._step(chunk)
            # At the limit, more of the same chunk may follow; it is never read.
            chunk = self._stream.unused_data if self._stream.eof else b""
        return bytes(out)

    def _step(self, chunk: bytes) -> bytes:
        try:
            piece = self._stream.decompress(chunk, self._left)
        except zlib.error:
            if self._started:
                raise _damaged() from None
            piece = self._bare(chunk)
        self._started = True
        self._left -= len(piece)
        return piece

    def _bare(self, chunk: bytes) -> bytes:
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            return self._stream.decompress(chunk, self._left)
        except zlib.error:
            raise _damaged() from None

    def check_end(self) -> None:
        """Raises if the stream was cut short."""
        if self._started and not self._stream.eof:
            raise FetchError("truncated", "the packed body ended early")


def _damaged() -> FetchError:
    return FetchError("invalid_answer", "the packed body is damaged", transient=False)


class Watch:
    """Stops reading a body when its connection closes."""

    def __init__(self) -> None:
        self._heard: WeakSet[asyncio.Future[None]] = WeakSet()

    @contextmanager
    def over(self, response: ClientResponse) -> Iterator[None]:
        """Guards a block that reads `response.content`, so that it neither hangs nor takes a part for the whole.

        FetchError: invalid_answer or truncated.
        """
        connection = response.connection
        if connection is None or connection.protocol is None:  # the body has already arrived
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
        if failure is not None:  # it came after the last bytes
            raise failure


def _hear(closed: asyncio.Future[None]) -> None:
    # Connections often fail, even long after their last response: not worth logging.
    if not closed.cancelled():
        closed.exception()


def _end(response: ClientResponse, closed: asyncio.Future[None] | None) -> None:
    content = response.content
    if content.exception() is not None:
        return
    if not content.is_eof():  # truncation has been reported by now
        content.set_exception(FetchError("invalid_answer", INVALID_HTTP))
    elif closed is not None and not closed.cancelled() and closed.exception() and _ends_with_connection(response):
        content.set_exception(FetchError("truncated", ENDED_EARLY))


def _ends_with_connection(response: ClientResponse) -> bool:
    return not {"Content-Length", "Transfer-Encoding"} & set(map(str.title, response.headers))
