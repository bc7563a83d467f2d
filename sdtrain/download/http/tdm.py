"""Honours TDMRep, the W3C community's protocol to reserve text and data mining, in headers and sites' files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from yarl import URL

from sdtrain.download.http.failures import FetchError

PATH = "/.well-known/tdmrep.json"
_ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")


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
