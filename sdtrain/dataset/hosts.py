"""The host of a URL."""

from __future__ import annotations

from urllib.parse import urlsplit


def host_of(url: str) -> str:
    """The host that a request for `url` goes to: lower case, without the last dot, in ASCII; "" if there is none."""
    try:
        return plain_host(urlsplit(url.strip()).hostname or "")
    except ValueError:
        return ""


def plain_host(host: str) -> str:
    """A host's name as it is compared.

    Raises:
        ValueError: it cannot be one.
    """
    name = host.lower().rstrip(".")
    return name if name.isascii() else name.encode("idna").decode("ascii")
