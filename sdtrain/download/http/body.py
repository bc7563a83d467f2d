"""Bodies within a size, also after they are unpacked: a few kilobytes of gzip can hold gigabytes."""

from __future__ import annotations

import zlib

from aiohttp import ClientResponse

from sdtrain.download.http.failures import FetchError

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_ENCODINGS = {"gzip", "x-gzip", "deflate"}
_SHOWN = 40


async def read_body(response: ClientResponse, max_bytes: int, cut: bool = False) -> bytes:
    """The whole body, unpacked.

    Args:
        response: an answer whose body was not touched, of a session that does not unpack by itself.
        max_bytes: most bytes, as sent and unpacked.
        cut: leave off what is too much, instead of failing.

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
    """The failure of a body over `max_bytes`."""
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
    """gzip in any number of members, zlib, or the bare deflate that some servers send for it."""

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
            # At the limit there may be more to come of the same chunk; nobody will ask for it.
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
        """Raises where the stream ended before its end."""
        if self._started and not self._stream.eof:
            raise FetchError("truncated", "the packed body ended early")


def _damaged() -> FetchError:
    return FetchError("invalid_answer", "the packed body is damaged", passing=False)
