"""X-Robots-Tag: what a site says in its answers about robots, and whether it means this one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sdtrain.download.http.failures import FetchError

OUR_NAMES = ("sdtrain", "img2dataset")
"""Sites know this program by its own name and by that of the engine whose layout it writes."""
# "none" is short for noindex and nofollow.
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_ROBOT = re.compile(r"[a-z*][\w*./-]*")


def check_robots_header(values: Iterable[str]) -> None:
    """Raises where one of the X-Robots-Tag headers of an answer forbids its use.

    A robot's name before a directive (`otherbot: noai, noindex`) holds until the next name or the header's end.

    Raises:
        FetchError: robots_header.
    """
    for value in values:
        robot = "*"
        for part in value.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if name in _WITH_VALUES:
                continue  # it says nothing about use
            if colon and _ROBOT.fullmatch(name):  # else it is the time in a date
                robot = name
            directive = rest if colon else name
            if directive in OPT_OUT and robot in ("*", *OUR_NAMES):
                raise FetchError("robots_header", f"X-Robots-Tag: {directive}")
