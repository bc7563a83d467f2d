"""Reads the size of a JPEG XL image: its Pillow plugin decodes all pixels before it tells it."""

from __future__ import annotations

from collections.abc import Callable

STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_CODESTREAM = b"\xff\x0a"
_HEAD_BYTES = 16
# The widths of the numbers by their selector, and the sides' ratios (ISO/IEC 18181-1, SizeHeader).
_BITS = (9, 13, 18, 30)
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def jxl_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels, of a bare codestream or one in a container; None if there is none."""
    begin = _codestream(content)
    head = content[begin + 2 : begin + 2 + _HEAD_BYTES]
    if content[begin : begin + 2] != _CODESTREAM or len(head) < _HEAD_BYTES:
        return None
    left = int.from_bytes(head, "little")

    def take(bits: int) -> int:
        nonlocal left
        value, left = left & ((1 << bits) - 1), left >> bits
        return value

    is_in_eighths = take(1) == 1
    height = _side(take, is_in_eighths)
    ratio = _RATIOS.get(take(3))
    width = height * ratio[0] // ratio[1] if ratio else _side(take, is_in_eighths)
    return width, height


def _side(take: Callable[[int], int], is_in_eighths: bool) -> int:
    return 8 * (1 + take(5)) if is_in_eighths else 1 + take(_BITS[take(2)])


def _codestream(content: bytes) -> int:
    if content.startswith(_CODESTREAM):
        return 0
    whole, part = content.find(b"jxlc"), content.find(b"jxlp")
    return part + 8 if part >= 0 and (whole < 0 or part < whole) else whole + 4
