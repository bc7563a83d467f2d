"""Honours robots.txt (RFC 9309) and X-Robots-Tag headers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from protego import Protego
from yarl import URL

from sdtrain.download.http.failures import FetchError

OUR_NAMES = ("sdtrain", "img2dataset")
"""Sites know this program by its own name and by that of the engine whose layout it writes."""
# "none" is short for noindex and nofollow.
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_ROBOT = re.compile(r"[a-z*][\w*./-]*")


PATH = "/robots.txt"
# Permanently unavailable, which counts as having none.
_NO_RULES = {"blocked_address", "too_many_redirects", "url_not_allowed"}


def parse_robots_txt(file: bytes | FetchError) -> Protego | None:
    """The rules of a robots.txt; None if there are none (4xx).

    FetchError: robots_txt if the server fails (5xx), which forbids everything; the failure itself if the site cannot be
    reached, which says more about its URLs.
    """
    if isinstance(file, bytes):
        return Protego.parse(file.decode("utf-8-sig", "replace"))
    if file.reason.startswith("http_5") or file.reason == "unknown_encoding":
        raise FetchError("robots_txt", "the rules cannot be read")
    if file.reason.startswith("http_") or file.reason in _NO_RULES:
        return None
    raise FetchError(file.reason, file.detail, transient=False)  # already retried


def check_robots_txt(rules: Protego | None, url: URL) -> None:
    """Raises FetchError robots_txt if the rules forbid `url` to robots like this one."""
    if rules is not None and not all(rules.can_fetch(str(url), name) for name in OUR_NAMES):
        raise FetchError("robots_txt", "disallowed")


def check_robots_header(values: Iterable[str]) -> None:
    """Raises FetchError robots_header if an X-Robots-Tag header forbids the image's use.

    A robot's name before a directive (`otherbot: noai, noindex`) holds until the next name or the header's end.
    """
    for value in values:
        robot = "*"
        for part in value.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if name in _WITH_VALUES:
                continue  # says nothing about use
            if colon and _ROBOT.fullmatch(name):  # else it is the time in a date
                robot = name
            directive = rest if colon else name
            if directive in OPT_OUT and robot in ("*", *OUR_NAMES):
                raise FetchError("robots_header", f"X-Robots-Tag: {directive}")
