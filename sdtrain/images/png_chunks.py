"""Rewrites a PNG that Pillow would refuse for what no pixel needs: large or damaged metadata, a missing end.

Metadata are only counted, up to a mebibyte, and never kept unpacked: a few kilobytes of a profile or text can unpack to
gigabytes. Of the texts, those stay that can give the image's orientation.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"
_OF_PIXELS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}
_LEAST_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_ORIENTED = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
_MAX_UNPACKED = 2**20  # Pillow's limit for one chunk
_MAX_TEXTS = 2**26  # and for all texts
_PIECE = 2**16
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7's passes (PNG specification, 8.2): the first column and row, and the steps.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@dataclass(frozen=True)
class _Chunk:
    kind: bytes
    begin: int
    """Of its data."""
    end: int

    @property
    def size(self) -> int:
        """The bytes of its data."""
        return self.end - self.begin


def readable_png(content: bytes, max_pixels: int) -> bytes:
    """The PNG without metadata that Pillow refuses, and with the end that it lacks if no pixel is missing.

    The same object where there is nothing to do. Animations without their end stay so: frames may be missing.
    """
    chunks = list(_chunks(content))
    if not chunks or chunks[0].kind != b"IHDR":
        return content
    rest = content[chunks[-1].end + 4 :]
    end = None if chunks[-1].kind == b"IEND" else _end(content, chunks, rest, max_pixels)
    refused = _refused(content, chunks)
    if end is None and not refused:
        return content
    kept = (content[chunk.begin - 8 : chunk.end + 4] for chunk in chunks if chunk not in refused)
    return b"".join([SIGNATURE, *kept, rest if end is None else end])


def _chunks(content: bytes) -> Iterator[_Chunk]:
    """Yields the complete chunks, to the end of the image or of what can be read."""
    position = len(SIGNATURE)
    while position + 12 <= len(content):
        length, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        if position + 12 + length > len(content) or not kind.isalpha():
            return
        yield _Chunk(kind, position + 8, position + 8 + length)
        if kind == b"IEND":
            return
        position += 12 + length


def _refused(content: bytes, chunks: Sequence[_Chunk]) -> set[_Chunk]:
    """All metadata but orientations, if Pillow refuses one chunk, or all together; else nothing."""
    metadata = [chunk for chunk in chunks if chunk.kind[:1].islower() and chunk.kind not in _OF_PIXELS]
    accepted = [chunk for chunk in metadata if _is_accepted(content, chunk)]
    texts = sum(_num_unpacked(content, chunk) for chunk in accepted if chunk.kind in _TEXTS)
    if len(accepted) == len(metadata) and texts <= _MAX_TEXTS:
        return set()
    kept, room = set[_Chunk](), _MAX_UNPACKED
    for chunk in accepted:
        size = _num_unpacked(content, chunk)
        if _may_orient(content, chunk) and size <= room:
            kept.add(chunk)
            room -= size
    return set(metadata) - kept


def _is_accepted(content: bytes, chunk: _Chunk) -> bool:
    crc = int.from_bytes(content[chunk.end : chunk.end + 4], "big")
    if zlib.crc32(content[chunk.begin - 4 : chunk.end]) != crc or chunk.size < _LEAST_BYTES.get(chunk.kind, 0):
        return False
    if chunk.kind in (b"iCCP", b"zTXt"):
        rest = content[chunk.begin : chunk.end].partition(b"\0")[2]
        is_known = rest[:1] == b"\0" if rest or chunk.kind == b"iCCP" else True
        return is_known and _num_unpacked(content, chunk) <= _MAX_UNPACKED
    return chunk.kind != b"iTXt" or not _packed(content, chunk) or _num_unpacked(content, chunk) <= _MAX_UNPACKED


def _may_orient(content: bytes, chunk: _Chunk) -> bool:
    return chunk.kind == b"eXIf" or (
        chunk.kind in _TEXTS and content[chunk.begin : chunk.begin + 80].partition(b"\0")[0] in _ORIENTED
    )


def _packed(content: bytes, chunk: _Chunk) -> bytes:
    """The deflated part of a profile or text; empty if there is none."""
    rest = content[chunk.begin : chunk.end].partition(b"\0")[2]
    if chunk.kind in (b"iCCP", b"zTXt"):
        return rest[1:]
    if chunk.kind == b"iTXt" and rest[:1] > b"\0" and rest[1:2] == b"\0":
        return rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return b""


def _num_unpacked(content: bytes, chunk: _Chunk) -> int:
    """The bytes that Pillow would hold of a chunk, counted no further than to its limit."""
    packed = _packed(content, chunk)
    return _num_inflated([packed], _MAX_UNPACKED + 1) if packed else chunk.size


def _end(content: bytes, chunks: Sequence[_Chunk], rest: bytes, max_pixels: int) -> bytes | None:
    """What is to follow the chunks: the cut one's pixels and an end; None if pixels are missing."""
    is_cut_data, head = rest[4:8] == b"IDAT", content[chunks[0].begin : chunks[0].end]
    data = rest[8 : 8 + int.from_bytes(rest[:4], "big")] if is_cut_data else b""
    width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    if width * height > max_pixels or any(chunk.kind == b"acTL" for chunk in chunks):
        return None
    needed = _num_filtered(head)
    pieces = [content[chunk.begin : chunk.end] for chunk in chunks if chunk.kind == b"IDAT"]
    if not needed or _num_inflated([*pieces, data], needed) < needed:
        return None
    return (_chunk(b"IDAT", data) if data else b"") + END


def _num_filtered(head: bytes) -> int:
    """The bytes that an image's data inflate to, with each row's filter; 0 for a head that makes no sense."""
    if len(head) < 13 or head[9] not in _CHANNELS:
        return 0
    width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    bits, passes = head[8] * _CHANNELS[head[9]], _PASSES if head[12] else ((0, 0, 1, 1),)
    sizes = [(-((left - width) // across), -((top - height) // down)) for left, top, across, down in passes]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def _num_inflated(pieces: Iterable[bytes], most: int) -> int:
    """Counts the bytes that a deflated stream holds, to `most` at least, without keeping them."""
    stream, size = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            while piece and not stream.eof and size < most:
                size += len(stream.decompress(piece, _PIECE))
                piece = stream.unconsumed_tail
    except zlib.error:
        pass
    return size


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
