"""Honours what sites permit: robots.txt (RFC 9309), X-Robots-Tag headers, and TDMRep.

TDMRep is the W3C community's protocol to reserve text and data mining, in headers and sites' files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from protego import Protego
from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.retry import Budget, with_retries
from sdtrain.download.http.single_flight import SingleFlightCache
from sdtrain.download.http.transport import Terms, Transport

R = TypeVar("R")
ROBOTS_PATH, TDM_PATH = "/robots.txt", "/.well-known/tdmrep.json"
OUR_NAMES = ("sdtrain", "img2dataset")
"""Sites know this program by its own name and by that of the engine whose layout it writes."""
# "none" is short for noindex and nofollow.
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_ROBOT = re.compile(r"[a-z*][\w*./-]*")
# Permanently unavailable, which counts as having none.
_NO_RULES = {"blocked_address", "too_many_redirects", "url_not_allowed"}
_ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_MAX_BYTES = 500 * 2**10
"""The size that RFC 9309 requires to be read; the rest is ignored."""
_KEPT_S = 24 * 3600
_KEPT_FAILURE_S = 300


def parse_robots_txt(file: bytes | FetchError) -> Protego | None:
    """The rules of a robots.txt; None if there are none (4xx).

    Raises:
        FetchError: robots_txt if the server fails (5xx), which forbids everything; the failure itself if the site
            cannot be reached, which says more about its URLs.
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


def check_tdm_header(values: Iterable[str]) -> None:
    """Raises FetchError tdm_reserved if a tdm-reservation header reserves the answer."""
    if any(value.strip() == "1" for value in values):
        raise FetchError("tdm_reserved", "tdm-reservation: 1")


@dataclass(frozen=True)
class TdmRule:
    """A path pattern, reserved or not: `*` matches anything, a final `$` the end of the path."""

    pieces: tuple[str, ...]
    to_the_end: bool
    reserved: bool

    @classmethod
    def parse(cls, rule: Any) -> TdmRule | None:
        """Parses one rule of tdmrep.json; None if it is not one."""
        if not isinstance(rule, dict) or not isinstance(rule.get("location"), str):
            return None
        location = _comparable(rule["location"])
        pieces = tuple(location.removesuffix("$").split("*"))
        return cls(pieces, location.endswith("$"), str(rule.get("tdm-reservation")) == "1")

    def matches(self, path: str) -> bool:
        """Whether the pattern matches `path`; compared piece by piece, so that no pattern takes long."""
        first, *others = self.pieces
        if not path.startswith(first):
            return False
        position = len(first)
        last = others.pop() if others and self.to_the_end else None
        for piece in others:
            found = path.find(piece, position)
            if found < 0:
                return False
            position = found + len(piece)
        if last is not None:
            return path.endswith(last) and len(path) - len(last) >= position
        return not self.to_the_end or position == len(path)


def parse_tdm_file(file: bytes | FetchError) -> Sequence[TdmRule]:
    """The rules of a tdmrep.json in order; none if the file is damaged or unavailable."""
    if isinstance(file, FetchError):
        return ()
    try:
        content = json.loads(file)
    except (ValueError, RecursionError):
        return ()
    # A rule without the list around it is a common slip with a plain meaning.
    rules = content if isinstance(content, list) else [content]
    return [rule for rule in map(TdmRule.parse, rules) if rule is not None]


def check_tdm_rules(rules: Sequence[TdmRule], url: URL) -> None:
    """Raises FetchError tdm_reserved if the first rule that matches `url` reserves it.

    A header would override the file, but to see it one would have to take the image.
    """
    path = _comparable(url.raw_path_qs)
    if next((rule.reserved for rule in rules if rule.matches(path)), False):
        raise FetchError("tdm_reserved", "tdmrep.json")


def _comparable(path: str) -> str:
    """Escapes only those characters of a path that must be."""

    def plain(escape: re.Match[str]) -> str:
        character = chr(int(escape.group(1), 16))
        return character if _UNRESERVED.fullmatch(character) else escape.group().upper()

    return _ESCAPE.sub(plain, quote(path, safe="%/:=&?~#+!$,;'@()*[]|", errors="replace"))


class SiteFile(Generic[R]):
    """The rules of each site (scheme, host and port) from which an image is requested, fetched once.

    The file at `path` is fetched like an image, with the same checks, limits and manners, but its own budget; `parse`
    turns it, or the failure to fetch it, into rules.
    """

    def __init__(
        self, transport: Transport, config: DownloadConfig, path: str, parse: Callable[[bytes | FetchError], R]
    ) -> None:
        self._transport = transport
        self._config = config
        self._path = path
        self._parse = parse
        self._rules: SingleFlightCache[URL, R] = SingleFlightCache(
            self._fetch, lambda outcome: _KEPT_FAILURE_S if isinstance(outcome, FetchError) else _KEPT_S
        )

    async def rules_for(self, url: URL) -> R:
        """The rules of the site of `url`; FetchError as `parse` raises."""
        return await self._rules.get(URL.build(scheme=url.scheme, authority=url.raw_authority, encoded=True))

    async def close(self) -> None:
        """Cancels the fetches in progress."""
        await self._rules.close()

    async def _fetch(self, site: URL) -> R:
        budget = Budget(self._config.deadline_s)
        url = site.with_path(self._path)
        try:
            answer = await with_retries(
                lambda: self._transport.follow(url, budget, Terms(_MAX_BYTES, cut=True)),
                self._config.retries,
                budget,
            )
        except FetchError as error:
            return self._parse(error)
        return self._parse(answer.body)
