"""Completes a JPEG that lacks its end marker, if every pixel is there.

A decoder fills what is missing without a word, so the file itself must show that nothing is:

- every component has its scan; in a progressive file, every coefficient has its last bit (ITU-T T.81, G.1);
- the last scan has all its restart markers;
- no continuation of its data changes a pixel: the file is decoded with four pairs that differ in every bit. Were one
  bit missing, the two of a pair would give different coefficients; several, because a block at the edge may show few.

Bytes behind the data, but zeros, could be an error message in the place of lost data, which decodes to noise: a file
whose last 256 bytes change no pixel counts as cut.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image, JpegImagePlugin  # noqa: F401  # the import registers the reader

END = b"\xff\xd9"
_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_COEFFICIENTS = 64
_FOREIGN_BYTES, _ZEROS_OF_DATA = 256, 3
_CONTINUATIONS = tuple(
    bytes(byte ^ turned for byte in hashlib.shake_128(bytes([seed])).digest(256) if byte not in (0, 255)) + END
    for seed in range(4)
    for turned in (0, 255)
)  # without a byte that begins a marker
_one_at_a_time = threading.Lock()  # each test decodes an image of any size


def first_scan(content: bytes) -> int:
    """The start of the compressed data; an end marker before it belongs to a thumbnail."""
    return next((place for place, marker in _markers(content) if marker == _SCAN), len(content))


def with_end(content: bytes, max_pixels: int) -> bytes | None:
    """The file with an end, if it lacks one and nothing else; None if pixels are missing or over the limit."""
    scan = _last_scan(content)
    if scan is None or not 0 < scan.num_pixels <= max_pixels or not scan.is_last:
        return None
    data = _without_padding(content[scan.begin :])
    restarts = list(_RESTART.finditer(data))
    if len(restarts) != scan.num_restarts:
        return None
    whole = content[: scan.begin] + data
    num_droppable = len(data) - (restarts[-1].end() if restarts else 0) - 1
    with _one_at_a_time:
        is_whole = _is_determined(whole)
        if is_whole and num_droppable >= _FOREIGN_BYTES:
            is_whole = not _is_determined(_without_padding(whole[:-_FOREIGN_BYTES]))
    # Not the marker alone: some data end in bits that change nothing, but that decoders wait for.
    return whole + _CONTINUATIONS[0] if is_whole else None


@dataclass
class _Frame:
    width: int
    height: int
    is_progressive: bool
    samplings: dict[int, tuple[int, int]]
    bits_left: dict[int, dict[int, int]] = field(default_factory=dict)
    """Component -> coefficient -> how many low bits no scan has given yet."""

    def read(self, ids: list[int], first: int, last: int, bits_left: int) -> None:
        """Records a scan."""
        for name in ids:
            known = self.bits_left.setdefault(name, {})
            known.update(dict.fromkeys(range(first, last + 1), bits_left))

    @property
    def is_complete(self) -> bool:
        """Whether the scans read give every bit of every coefficient."""
        needed = _COEFFICIENTS if self.is_progressive else 1
        scans = [self.bits_left.get(name, {}) for name in self.samplings]
        return all(known.get(k) == 0 for known in scans for k in range(needed))

    def num_blocks(self, ids: list[int]) -> int:
        """The scan's minimum coded units (T.81, A.2)."""
        widest, tallest = (max(sides) for sides in zip(*self.samplings.values(), strict=True))
        if len(ids) > 1:
            return math.ceil(self.width / (8 * widest)) * math.ceil(self.height / (8 * tallest))
        across, down = self.samplings[ids[0]]
        columns, rows = math.ceil(self.width * across / widest), math.ceil(self.height * down / tallest)
        return math.ceil(columns / 8) * math.ceil(rows / 8)


@dataclass
class _Scan:
    begin: int
    num_pixels: int
    num_restarts: int
    is_last: bool


def _last_scan(content: bytes) -> _Scan | None:
    """The scan whose data the file ends in; None if it ends elsewhere, or makes no sense."""
    frame, interval = None, 0
    try:
        for place, marker in _markers(content):
            segment = content[place + 4 : place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")]
            if marker in _FRAMES:
                frame = _frame(marker, segment)
            elif marker == _RESTART_INTERVAL:
                interval = int.from_bytes(segment[:2], "big")
            elif marker == _SCAN and frame is not None:
                num = segment[0]
                ids = [segment[1 + 2 * i] for i in range(num)]
                first, last, bits = segment[1 + 2 * num : 4 + 2 * num]
                frame.read(ids, *((first, last, bits & 15) if frame.is_progressive else (0, 0, 0)))
                begin = place + 4 + len(segment)
                if _NEXT_MARKER.search(content, begin) is None:
                    restarts = max(0, math.ceil(frame.num_blocks(ids) / interval) - 1) if interval else 0
                    return _Scan(begin, frame.width * frame.height, restarts, frame.is_complete)
    except (IndexError, ValueError, KeyError, ZeroDivisionError):
        pass
    return None


def _frame(marker: int, segment: bytes) -> _Frame:
    height, width = (int.from_bytes(segment[at : at + 2], "big") for at in (1, 3))
    components = (segment[6 + 3 * i : 9 + 3 * i] for i in range(segment[5]))
    samplings = {name: (sampling >> 4, sampling & 15) for name, sampling, _ in components}
    return _Frame(width, height, marker in _PROGRESSIVE, samplings)


def _markers(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields the places and codes of the markers outside scans' data, as far as the segments' lengths lead."""
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:  # decoders skip anything else between segments
            position += 1 if marker == 0xFF else 2
            continue
        yield position, marker
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")


def _without_padding(data: bytes) -> bytes:
    """Without the zeros behind it; a few may be data, whose last code has no ones."""
    stripped = data.rstrip(b"\0")
    if len(data) - len(stripped) <= _ZEROS_OF_DATA:
        return data.rstrip(b"\xff")
    if stripped.endswith(b"\xff") and len(stripped) < len(data):
        return stripped + b"\0"  # an 0xFF of the data is followed by a zero
    return stripped.rstrip(b"\xff")


def _is_determined(content: bytes) -> bool:
    """Whether no continuation changes a pixel."""
    try:
        first = _pixels(content + _CONTINUATIONS[0])
        return all(_pixels(content + other) == first for other in _CONTINUATIONS[1:])
    except Exception:  # whatever a damaged file does to the decoder, it is not whole
        return False


def _pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return hashlib.blake2b(image.tobytes()).digest()
