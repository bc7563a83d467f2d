"""Parsing of text-file entries of blocklists and allowlists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlsplit

from sdtrain.dataset.addresses import plain_host
from sdtrain.errors import UserError

Entry = str | int
_COMMENT = re.compile(r"\s+#.*")
_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[?[0-9a-f:.]+\]?")


def read_entries(lines: Iterable[str], by: str, name: str) -> Iterator[Entry]:
    """Parses a text file's entries, skipping blank lines and comments; raises `UserError` with file and line.

    A comment is a line that begins with #, or what follows white space and # behind an entry: the # of a URL's fragment
    has none before it. A caption may hold both, so that entries by url_caption end with their line.
    """
    read = _READERS[by]
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            # White space around a caption is part of it.
            yield read(line.rstrip("\r\n") if by == "url_caption" else _COMMENT.sub("", text))
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {text[:100]!r} is not {_WHAT[by]}.") from error


def read_host(text: str) -> str:
    """Normalizes a host: `*.Example.com` and `https://example.com/` mean example.com; else `ValueError`."""
    host = (urlsplit(text).hostname or "") if "://" in text else text
    name = plain_host(host.removeprefix("*").removeprefix("."))
    if not _HOST.fullmatch(name):
        raise ValueError(text)
    return name.strip("[]")


def _read_url(text: str) -> str:
    if "://" not in text:
        raise ValueError(text)
    return text


def _read_hash(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise ValueError(text)
    # Programs without signed integers write the same 64 bits as a larger number.
    return number - 2**64 if number >= 2**63 else number


def _read_hex(num_chars: int) -> Callable[[str], str]:
    pattern = re.compile(rf"[0-9a-fA-F]{{{num_chars}}}")

    def read(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(text)
        return text.lower()

    return read


def _read_url_caption(text: str) -> str:
    url, tab, caption = text.partition("\t")
    if not tab:
        raise ValueError(text)
    return f"{url.strip()}\n{caption}"


def _read_phash(text: str) -> int:
    number = int(text, 16) if text.lower().startswith("0x") else int(text)
    return _read_hash(str(number))


_READERS: dict[str, Callable[[str], Entry]] = {
    "url": _read_url,
    "host": read_host,
    "hash": _read_hash,
    "uid": _read_hex(32),
    "md5": _read_hex(32),
    "sha256": _read_hex(64),
    "url_caption": _read_url_caption,
    "phash": _read_phash,
}
_WHAT = {
    "url": "a URL with scheme",
    "host": "a host's name",
    "hash": "a whole number of 64 bits, as LAION's hash is",
    "uid": "a uid (32 hexadecimal digits)",
    "md5": "an md5 (32 hexadecimal digits)",
    "sha256": "a sha256 (64 hexadecimal digits)",
    "url_caption": "a URL, a tab and a caption",
    "phash": "a perceptual hash (a whole number of 64 bits, or 0x and 16 hexadecimal digits)",
}
